# SPDX-License-Identifier: Apache-2.0
"""The CogVideoX transformer against diffusers, and what goldens do not show: files, sizes, rules, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel as Original
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from vidgen import config as loading
from vidgen import diffusion
from vidgen.models.cogvideox import PRESETS, CogVideoXConfig, CogVideoXTransformer3DModel, preset
from vidgen.models.cogvideox.checkpoint import PREFIX, convert_state_dict, fit_state_dict, to_sat
from vidgen.models.cogvideox.patches import cut_patches, join_patches
from vidgen.models.cogvideox.positions import resized_crop, rotary_table, sincos_table

OURS_ALONE = ("norm_out_eps", "rotary_grid", "learned_positions")
KINDS = ("tiny-2b", "tiny-5b", "tiny-5b-i2v", "tiny-1.5", "tiny-1.5-i2v")


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(name: str = "tiny-5b", std: float = 0.15, **changes: Any) -> CogVideoXTransformer3DModel:
    """All weights drawn wide enough that every part shows in the output."""
    model = CogVideoXTransformer3DModel(preset(name, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            norm = key.endswith("weight") and p.dim() == 1
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1 if norm else 0))
    return model.eval()


def make_inputs(config: CogVideoXConfig, latent: tuple[int, int, int], batch: int = 2) -> dict[str, Tensor]:
    return {
        "hidden_states": draw(batch, config.in_channels, *latent),
        "timestep": torch.linspace(20, 980, batch).long(),
        "encoder_hidden_states": draw(batch, config.max_text_seq_length, config.text_embed_dim, seed=2),
    }


def original_of(model: CogVideoXTransformer3DModel) -> Original:
    values = {k: v for k, v in loading.to_dict(model.config).items() if k not in OURS_ALONE}
    original = Original(**values).eval()
    original.load_state_dict(model.state_dict(), strict=True)
    return original


def original_rotation(config: CogVideoXConfig, latent: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
    """As diffusers' pipelines prepare it."""
    if not config.use_rotary_positional_embeddings:
        return None
    p, size = config.patch_size, (latent[1] // config.patch_size, latent[2] // config.patch_size)
    base = (config.sample_height // p, config.sample_width // p)
    if config.patch_size_t is None:
        crop = get_resize_crop_region_for_grid(size, base[1], base[0])
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, size, latent[0])
    frames = -(-latent[0] // config.patch_size_t)
    return get_3d_rotary_pos_embed(
        config.attention_head_dim, None, size, frames, grid_type="slice", max_size=(max(base[0], 40), max(base[1], 40))
    )


def run_original(original: Original, config: CogVideoXConfig, inputs: dict[str, Tensor]) -> Tensor:
    latent = inputs["hidden_states"]
    output = original(
        hidden_states=latent.transpose(1, 2),
        encoder_hidden_states=inputs["encoder_hidden_states"],
        timestep=inputs["timestep"],
        ofs=None if config.ofs_embed_dim is None else torch.full((1,), 2.0),
        image_rotary_emb=original_rotation(config, tuple(latent.shape[2:])),
        return_dict=False,
    )[0]
    return output.transpose(1, 2)


# Sizes of the releases


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("2b", 1_693_783_872, 736),
        ("5b", 5_570_283_072, 1024),
        ("5b-i2v", 5_570_479_680 + 17_776 * 3072, 1025),
        ("1.5-5b", 5_570_676_352, 1024),
        ("1.5-5b-i2v", 5_571_594_880, 1028),
    ],
)
def test_releases_have_the_published_size(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_15b_enlargement() -> None:
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(preset("15b-i2v"))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 14.53


@pytest.mark.parametrize("name", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(preset(name, num_layers=2))
        values = {k: v for k, v in loading.to_dict(model.config).items() if k not in OURS_ALONE}
        original = Original(**values)
    ours, theirs = model.state_dict(), original.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# Against diffusers


@pytest.mark.parametrize(
    "name, latent",
    [
        ("tiny-2b", (3, 6, 10)),
        ("tiny-2b", (1, 8, 4)),
        ("tiny-5b", (3, 6, 10)),
        ("tiny-5b", (2, 10, 6)),
        ("tiny-5b", (1, 4, 22)),
        ("tiny-5b-i2v", (3, 6, 10)),
        ("tiny-1.5", (4, 6, 10)),
        ("tiny-1.5", (2, 14, 8)),
        ("tiny-1.5-i2v", (6, 4, 4)),
    ],
)
def test_forward_equals_diffusers(name: str, latent: tuple[int, int, int]) -> None:
    model = make_model(name)
    inputs = make_inputs(model.config, latent)
    with torch.no_grad():
        ours, theirs = model(**inputs), run_original(original_of(model), model.config, inputs)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"attention_bias": False}, {"patch_bias": False}, {"norm_eps": 1e-2}])
def test_switches_equal_diffusers(changes: dict[str, Any]) -> None:
    model = make_model("tiny-5b", **changes)
    inputs = make_inputs(model.config, (2, 4, 6))
    with torch.no_grad():
        ours, theirs = model(**inputs), run_original(original_of(model), model.config, inputs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_scales_of_the_added_table_equal_diffusers() -> None:
    model = make_model("tiny-2b", spatial_interpolation_scale=0.7, temporal_interpolation_scale=2.5)
    inputs = make_inputs(model.config, (2, 4, 6))
    with torch.no_grad():
        ours, theirs = model(**inputs), run_original(original_of(model), model.config, inputs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_diffusers(name: str) -> None:
    model = make_model(name)
    original = original_of(model)
    inputs = make_inputs(model.config, (4 if "1.5" in name else 3, 6, 10))
    model(**inputs).square().mean().backward()
    run_original(original, model.config, inputs).square().mean().backward()
    theirs = dict(original.named_parameters())
    for key, p in model.named_parameters():
        if key == "patch_embed.pos_embedding":  # a buffer there, trained here as in SAT
            assert p.grad is not None and p.grad.abs().max() > 0
            continue
        torch.testing.assert_close(p.grad, theirs[key].grad, atol=1e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_checkpointed_gradients_are_the_same() -> None:
    model = make_model("tiny-5b")
    inputs = make_inputs(model.config, (2, 4, 4))
    grads = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        model(**inputs).square().mean().backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_training_compiles_as_one_graph() -> None:
    model = make_model("tiny-1.5-i2v", num_layers=1)
    inputs = make_inputs(model.config, (2, 4, 4))
    wanted, output = model(**inputs), torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_stays_near_float32() -> None:
    model = make_model("tiny-1.5-i2v", std=0.08)
    inputs = make_inputs(model.config, (2, 6, 6))
    with torch.no_grad():
        exact = model(**inputs)
        rough = model.to(torch.bfloat16)(**inputs)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.03


# Positions


@pytest.mark.parametrize("size", [(30, 45), (24, 24), (45, 30), (5, 45), (31, 17), (1, 1)])
def test_crops_equal_diffusers(size: tuple[int, int]) -> None:
    assert resized_crop(size, (30, 45)) == get_resize_crop_region_for_grid(size, 45, 30)


def test_rotary_grids_agree_where_the_model_was_trained_and_nowhere_else() -> None:
    def table(grid: tuple[int, int, int], kind: str) -> Tensor:
        return rotary_table(grid, (30, 45), (16, 24, 24), kind)[0]

    torch.testing.assert_close(table((2, 30, 45), "linspace"), table((2, 30, 45), "slice"), atol=2e-5, rtol=0)
    assert (table((2, 24, 24), "linspace") - table((2, 24, 24), "slice")).abs().max() > 0.1
    with pytest.raises(ValueError, match="kind must be 'linspace' or 'slice'"):
        table((1, 2, 2), "stretch")


def test_the_named_rotary_grid_is_used() -> None:
    sliced, stretched = make_model("tiny-5b", rotary_grid="slice"), make_model("tiny-5b")
    inputs = make_inputs(sliced.config, (2, 8, 6))
    table = rotary_table((2, 4, 3), (3, 5), sliced.config.rope_sections, "slice")
    with torch.no_grad():
        assert torch.equal(sliced(**inputs), stretched(**inputs, rotary=table))
        assert not torch.allclose(sliced(**inputs), stretched(**inputs), atol=1e-3)


def test_text_is_not_rotated() -> None:
    cos, sin = rotary_table((2, 3, 3), (3, 3), (4, 6, 6), "slice", text_tokens=5)
    assert len(cos) == 5 + 18
    assert torch.equal(cos[:5], torch.ones(5, 8)) and torch.equal(sin[:5], torch.zeros(5, 8))


def test_the_added_table_puts_columns_before_rows() -> None:
    table = sincos_table((1, 2, 3), 32, spatial_scale=1.0, temporal_scale=1.0).view(2, 3, 32)
    frame, column, row = table.split([8, 12, 12], -1)
    assert torch.equal(frame, frame[:1, :1].expand_as(frame))
    assert torch.equal(column[0], column[1]) and not torch.equal(column[0, 0], column[0, 1])
    assert torch.equal(row[:, 0], row[:, 2]) and not torch.equal(row[0, 0], row[1, 0])


def test_learned_table_is_sliced_for_fewer_frames() -> None:
    model = make_model("tiny-5b-i2v")
    inputs = make_inputs(model.config, (2, 6, 10))
    table = model.patch_embed.pos_embedding.detach().clone()
    with torch.no_grad():
        x, y = model.patch_embed(inputs["hidden_states"], inputs["encoder_hidden_states"])
        model.patch_embed.pos_embedding.zero_()
        plain_x, plain_y = model.patch_embed(inputs["hidden_states"], inputs["encoder_hidden_states"])
    assert torch.equal(y, plain_y + table[:, :5])
    assert torch.equal(x, plain_x + table[:, 5 : 5 + 2 * 15])


def test_learned_table_of_other_frame_counts_as_diffusers_has_it() -> None:
    model = make_model("tiny-5b-i2v", learned_positions="sincos")
    inputs = make_inputs(model.config, (2, 6, 10))
    sliced = make_model("tiny-5b-i2v")
    with torch.no_grad():
        ours = model(**inputs)
        theirs = run_original(original_of(model), model.config, inputs)
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(ours, sliced(**inputs), atol=1e-2)
        whole = make_inputs(model.config, (3, 6, 10))
        assert torch.equal(model(**whole), sliced(**whole))


@pytest.mark.parametrize(
    "latent, tokens, message",
    [
        ((3, 8, 10), 5, "those of 3 x 5 patches, got 4 x 5"),
        ((4, 6, 10), 5, "those of 3 latent frames, got 4"),
        ((3, 6, 10), 4, "must have max_text_seq_length=5 tokens where positions are added, got 4"),
    ],
)
def test_learned_table_fits_one_size_only(latent: tuple[int, int, int], tokens: int, message: str) -> None:
    model = make_model("tiny-5b-i2v")
    inputs = make_inputs(model.config, latent)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :tokens]
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_any_text_length_without_added_positions() -> None:
    model = make_model("tiny-1.5")
    inputs = make_inputs(model.config, (2, 4, 4))
    inputs["encoder_hidden_states"] = draw(2, 3, model.config.text_embed_dim)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs), run_original(original_of(model), model.config, inputs), atol=2e-5, rtol=1e-4
        )


# Other rules


def test_patches_come_back() -> None:
    latent = draw(2, 3, 4, 6, 10)
    tokens = cut_patches(latent, (2, 3, 5))
    assert tokens.shape == (2, 8, 90)
    assert torch.equal(tokens[1, 1].view(3, 2, 3, 5), latent[1, :, :2, :3, 5:])
    assert torch.equal(join_patches(tokens, (2, 2, 2), (2, 3, 5)), latent)


def test_ofs_is_2_unless_stated_and_matters() -> None:
    model = make_model("tiny-1.5-i2v")
    inputs = make_inputs(model.config, (2, 4, 4))
    with torch.no_grad():
        usual = model(**inputs)
        assert torch.equal(usual, model(**inputs, ofs=torch.tensor([2.0])))
        torch.testing.assert_close(usual, model(**inputs, ofs=torch.tensor([2.0, 2.0])))
        assert not torch.allclose(usual, model(**inputs, ofs=3.0), atol=1e-3)
    with pytest.raises(ValueError, match=r"ofs must be a number, \(1\) or \(2\), got \(3,\)"):
        model(**inputs, ofs=torch.ones(3))


def test_norm_out_eps_is_its_own() -> None:
    inputs = make_inputs(preset("tiny-5b"), (1, 4, 4))
    with torch.no_grad():
        outputs = [make_model("tiny-5b", norm_out_eps=eps)(**inputs) for eps in (None, 1e-5, 1e-2)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": (2, 5, 2, 4, 4)}, r"hidden_states must be \(batch, 4, frames, height, width\)"),
        ({"hidden_states": (2, 4, 3, 4, 4)}, r"multiples of \(2, 2, 2\), got \(2, 4, 3, 4, 4\)"),
        ({"hidden_states": (2, 4, 2, 4, 5)}, r"multiples of \(2, 2, 2\), got \(2, 4, 2, 4, 5\)"),
        ({"hidden_states": (2, 4, 0, 4, 4)}, "hidden_states must be"),
        ({"timestep": (3,)}, r"timestep must be \(2,\), got \(3,\)"),
        ({"encoder_hidden_states": (2, 5, 21)}, r"encoder_hidden_states must be \(2, tokens, 20\), got \(2, 5, 21\)"),
        ({"encoder_hidden_states": (1, 5, 20)}, r"encoder_hidden_states must be \(2, tokens, 20\), got \(1, 5, 20\)"),
    ],
)
def test_bad_inputs(change: dict[str, tuple[int, ...]], message: str) -> None:
    model = make_model("tiny-1.5")
    inputs = make_inputs(model.config, (2, 4, 4)) | {name: draw(*shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"attention_head_dim": 24}, "attention_head_dim must be a multiple of 16"),
        ({"activation_fn": "gelu"}, "activation_fn must be 'gelu-approximate', got 'gelu'"),
        ({"dropout": 0.1}, "dropout must be 0.0, got 0.1"),
        ({"ofs_embed_dim": 16}, "ofs_embed_dim must be time_embed_dim=24, got 16"),
        ({"norm_out_eps": 0.0}, "last_norm_eps must be positive"),
        ({"patch_size_t": 2, "use_learned_positional_embeddings": True}, "patch_size_t goes with rotary"),
        ({"rotary_grid": "stretch"}, "rotary_grid must be"),
        ({"learned_positions": "none"}, "learned_positions must be"),
        (
            {"use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": True},
            "use_learned_positional_embeddings needs use_rotary_positional_embeddings",
        ),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("tiny-5b", **changes)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="no configuration '10b'; there are 2b, 5b"):
        preset("10b")


# Files


def test_folders_of_diffusers_and_ours_are_the_same(tmp_path: Path) -> None:
    model = make_model("tiny-5b-i2v")
    inputs = make_inputs(model.config, (3, 6, 10))
    original_of(model).save_pretrained(tmp_path / "theirs")
    ours = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "theirs")
    assert ours.config == model.config
    model.save_pretrained(tmp_path / "ours", max_shard_bytes=40_000)
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) > 1
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours")
    theirs = Original.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = model(**inputs)
        assert torch.equal(ours(**inputs), wanted) and torch.equal(again(**inputs), wanted)
        torch.testing.assert_close(run_original(theirs, model.config, inputs), wanted, atol=2e-5, rtol=1e-4)


def test_old_configurations_lack_what_came_later() -> None:
    fields = {k: v for k, v in loading.to_dict(preset("2b")).items() if k not in OURS_ALONE}
    for name in ("use_rotary_positional_embeddings", "use_learned_positional_embeddings", "patch_size_t"):
        del fields[name]
    for name in ("patch_bias", "ofs_embed_dim"):
        del fields[name]
    assert loading.load(CogVideoXConfig, fields) == PRESETS["2b"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrapper", [("module",), ("model", "module", "state_dict"), ("state_dict",), ()])
def test_sat_files(tmp_path: Path, name: str, wrapper: tuple[str, ...]) -> None:
    model = make_model(name)
    sat: Any = to_sat(model.state_dict())
    assert all(key.startswith(PREFIX) for key in sat)
    sat["model.diffusion_model.mixins.pos_embed.freqs_cos"] = torch.zeros(3, 3)
    sat["model.diffusion_model.transformer.position_embeddings.weight"] = torch.zeros(64, 4)
    sat["model.diffusion_model.transformer.word_embeddings.weight"] = torch.zeros(1, 4)
    sat["first_stage_model.encoder.conv_in.conv.weight"] = torch.zeros(1)
    if name == "tiny-2b":
        sat["model.diffusion_model.mixins.pos_embed.pos_embedding"] = torch.zeros(1, 50, 32)
    for key in reversed(wrapper):
        sat = {key: sat}
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(sat, file)
    again = CogVideoXTransformer3DModel.from_pretrained(file, config=model.config)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sat_names_of_every_release() -> None:
    for name in ("2b", "5b-i2v", "1.5-5b-i2v"):
        with torch.device("meta"):
            state = CogVideoXTransformer3DModel(preset(name)).state_dict()
        sat = to_sat(state)
        assert len(sat) == len(state) - 3 * 2 * preset(name).num_layers  # 3 into 1, and 2 into 1
        assert convert_state_dict({"module": sat}).keys() == state.keys()


def test_sat_orders_the_modulation_by_stream() -> None:
    state = make_model("tiny-5b").state_dict()
    fused = to_sat(state)[f"{PREFIX}mixins.adaln_layer.adaLN_modulations.1.1.bias"].chunk(12)
    attention, forward = (state[f"transformer_blocks.1.norm{k}.linear.bias"].chunk(6) for k in (1, 2))
    # shift, scale and gate of attention, then of the feed-forward network: of the video, then of the text
    wanted = (*attention[:3], *forward[:3], *attention[3:], *forward[3:])
    assert all(torch.equal(a, b) for a, b in zip(fused, wanted, strict=True))


def test_patch_projection_of_either_rank() -> None:
    for name in ("tiny-5b", "tiny-1.5"):
        model = make_model(name)
        state, key = model.state_dict(), "patch_embed.proj.weight"
        frames, rows, columns = model.config.patch
        other = state[key].flatten(1) if name == "tiny-5b" else state[key].unflatten(1, (-1, frames, rows, columns))
        fitted = fit_state_dict({**state, key: other}, model.config)
        assert torch.equal(fitted[key], state[key])


def test_to_sat_refuses_what_it_cannot_name() -> None:
    state = make_model("tiny-5b").state_dict()
    with pytest.raises(ValueError, match="1 names are not those of CogVideoX: head.weight"):
        to_sat({**state, "head.weight": torch.zeros(1)})
    del state["transformer_blocks.0.attn1.to_k.weight"]
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn1.to_k.weight is missing"):
        to_sat(state)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    sat = to_sat(make_model("tiny-1.5-i2v").state_dict())
    del sat[f"{PREFIX}ofs_embed.0.weight"]
    torch.save({"module": sat}, tmp_path / "sat.pt")
    with pytest.raises(ValueError, match="ofs_embedding.linear_1.weight"):
        CogVideoXTransformer3DModel.from_pretrained(tmp_path / "sat.pt", config=preset("tiny-1.5-i2v"))


# Training


def test_fresh_weights_are_those_of_sat() -> None:
    model = CogVideoXTransformer3DModel(preset("tiny-5b-i2v", num_attention_heads=8, num_layers=8))
    block = model.transformer_blocks[0]
    assert not block.norm1.linear.weight.any() and not block.norm2.linear.bias.any()
    assert abs(float(block.attn1.to_q.weight.detach().std()) - 0.02) < 0.001
    assert abs(float(block.ff.net[2].weight.detach().std()) - 0.02 / 16**0.5) < 0.0003
    assert not block.attn1.to_q.bias.any()
    assert model.norm_out.linear.weight.any() and not model.proj_out.bias.any()
    for weight in (model.patch_embed.proj.weight.flatten(1), model.proj_out.weight):  # Xavier uniform
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not model.patch_embed.pos_embedding.any()
    inputs = make_inputs(model.config, (3, 6, 10))
    with torch.no_grad():  # the blocks begin as identities
        x, y = model.patch_embed(inputs["hidden_states"], inputs["encoder_hidden_states"])
        after = block(x, y, torch.randn(2, 24), model.rotation((3, 3, 5), 5, x, None))
    assert torch.equal(after[0], x) and torch.equal(after[1], y)


@pytest.mark.parametrize("name", ["tiny-2b", "tiny-1.5-i2v"])
def test_the_loss_of_one_sample_falls(name: str) -> None:
    """To a twentieth of what it is at the start."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(preset(name, num_layers=1)).train()
    latents, image, text = (t.expand(2, *t.shape) for t in (draw(4, 2, 4, 4), draw(4, 2, 4, 4, seed=5), draw(5, 20)))
    table = diffusion.cogvideox_alphas_cumprod()
    noise, timesteps = draw(2, 4, 2, 4, 4, seed=3), torch.tensor([200, 800])

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return model(torch.cat([x, image], 1) if model.config.in_channels == 8 else x, timestep, text)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = diffusion.cogvideox_loss(velocity, latents, alphas_cumprod=table, timesteps=timesteps, noise=noise)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.05 * losses[0]
