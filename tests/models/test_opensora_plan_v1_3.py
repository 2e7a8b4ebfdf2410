# SPDX-License-Identifier: Apache-2.0
"""OpenSoraT2V beyond its golden cases (tests/goldens): size, masks, sparsity, files, training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen import config as loading
from vidgen import ops
from vidgen.diffusion import open_sora_plan_alphas_cumprod, v_prediction_loss
from vidgen.models.opensora_plan_v1_3 import (
    PRESETS,
    OpenSoraConfig,
    OpenSoraInpaint_v1_3,
    OpenSoraInpaintConfig,
    OpenSoraT2V_v1_3,
    preset,
)
from vidgen.models.opensora_plan_v1_3.checkpoint import MINDSPEED_MM_BLOCKS, MINDSPEED_MM_PARTS
from vidgen.models.opensora_plan_v1_3.model import visible_keys

ORIGINAL_CONFIG = json.loads(
    (Path(__file__).parents[1] / "data/golden/opensora_plan_v1_3/dit_inpaint_skiparse4.json").read_text()
)["config"]
GROUPED = {"num_layers": 6, "sparse_n": 2}


def make_model(name: str = "tiny", seed: int = 0, std: float = 0.15, **changes: Any) -> OpenSoraT2V_v1_3:
    """With all weights drawn wide enough that every part shows in the output."""
    config = preset(name, **changes)
    model = (OpenSoraInpaint_v1_3 if isinstance(config, OpenSoraInpaintConfig) else OpenSoraT2V_v1_3)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model.eval()


def make_inputs(
    batch: int = 2, grid: tuple[int, int, int] = (3, 6, 6), tokens: int = 5, channels: int = 4
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": draw(batch, channels, *grid),
        "timestep": torch.linspace(100, 900, batch),
        "encoder_hidden_states": draw(batch, tokens, 20),
    }


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# Size


def released_shapes(inpaint: bool) -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released checkpoint, as the reference page lists them."""
    d = 2304
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (2, d)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def patches(name: str, channels: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (d, channels, 2, 2), (d,)

    patches("pos_embed.proj", 8)
    linear("caption_projection.linear_1", d, 4096)
    linear("caption_projection.linear_2", d, d)
    linear("adaln_single.emb.timestep_embedder.linear_1", d, 256)
    linear("adaln_single.emb.timestep_embedder.linear_2", d, d)
    linear("adaln_single.linear", 6 * d, d)
    for i in range(32):
        block = f"transformer_blocks.{i}"
        shapes[f"{block}.scale_shift_table"] = (6, d)
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{block}.{attention}.{name}", d, d)
        linear(f"{block}.ff.net.0.proj", 4 * d, d)
        linear(f"{block}.ff.net.2", d, 4 * d)
    linear("proj_out", 32, d)
    if inpaint:
        patches("pos_embed_masked_hidden_states.0.proj", 8)
        patches("pos_embed_mask.0.proj", 4)
        shapes["pos_embed_masked_hidden_states.1.weight"] = shapes["pos_embed_mask.1.weight"] = (d, d)
    return shapes


@pytest.mark.parametrize(
    ("name", "cls", "count"),
    [("released", OpenSoraT2V_v1_3, 2_771_981_600), ("released_i2v", OpenSoraInpaint_v1_3, 2_782_713_632)],
)
def test_released_names_shapes_and_counts(name: str, cls: type[OpenSoraT2V_v1_3], count: int) -> None:
    with torch.device("meta"):
        model = cls(preset(name))
    assert sum(p.numel() for p in model.parameters()) == count
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert shapes == released_shapes(inpaint=name.endswith("i2v"))


def test_sparse_layers_of_the_release() -> None:
    layers = [preset("released").layer_sparsity(i) for i in range(32)]
    assert [n for n, _ in layers] == [1, 1] + [4] * 28 + [1, 1]
    assert [pattern for _, pattern in layers] == ["single", "group"] * 16
    assert {n for n, _ in (preset("released", num_layers=40).layer_sparsity(i) for i in range(30, 40))} == {1}


# Configuration


def test_config_is_the_originals() -> None:
    config = loading.load(OpenSoraInpaintConfig, ORIGINAL_CONFIG)
    assert (config.hidden_size, config.input_channels, config.sparse_n) == (48, 20, 4)
    assert loading.load(OpenSoraInpaintConfig, loading.to_dict(config)) == config
    # what the original's class does when its file does not say
    short = {key: ORIGINAL_CONFIG[key] for key in ("num_attention_heads", "attention_head_dim", "num_layers")}
    config = loading.load(OpenSoraConfig, {**short, "caption_channels": 8})
    assert (config.sparse1d, config.sparse_n, config.out_channels, config.cross_attention_dim) == (False, 2, 8, 48)


def test_config_lists_all_problems() -> None:
    bad = {"attention_head_dim": 16, "cross_attention_dim": 7, "sparse_n": 0, "dropout": 0.1, "activation_fn": "geglu"}
    with pytest.raises(ValueError) as error:
        preset("tiny_i2v", **bad, patch_size_t=2, interpolation_scale_h=0.0, vae_scale_factor_t=0)
    for part in (
        "OpenSoraInpaintConfig",
        "multiple of 6",
        "cross_attention_dim must be the hidden width, 32",
        "sparse_n must be at least 1",
        "dropout must be 0.0",
        "activation_fn must be 'gelu-approximate'",
        "patch_size_t must be 1",
        "interpolation_scale_h must be positive",
        "vae_scale_factor_t must be at least 1",
    ):
        assert part in str(error.value), part
    with pytest.raises(ValueError, match=f"there are {', '.join(PRESETS)}"):
        preset("huge")


# Masks


def test_masks_of_ones_are_no_masks() -> None:
    model, inputs = make_model(**GROUPED), make_inputs()
    ones = {"attention_mask": torch.ones(2, 3, 6, 6), "encoder_attention_mask": torch.ones(2, 1, 5)}
    torch.testing.assert_close(model(**inputs, **ones), model(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_hidden_positions_have_no_effect(dtype: torch.dtype) -> None:
    model, inputs = make_model(**GROUPED), make_inputs()
    mask, text_mask = torch.ones(2, 3, 6, 6), torch.ones(2, 5)
    mask[1, :, 4:] = 0
    text_mask[0, 3:] = 0
    masks = {"attention_mask": mask.to(dtype), "encoder_attention_mask": text_mask.to(dtype)}
    before = model(**inputs, **masks)
    changed = {name: t.clone() for name, t in inputs.items()}
    changed["hidden_states"][1, :, :, 4:] += 3
    changed["encoder_hidden_states"][0, 3:] += 3
    after = model(**changed, **masks)
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after[1, :, :, :4], before[1, :, :, :4], rtol=1e-6, atol=1e-6)
    assert difference(model(**changed)[0], before[0]) > 1e-3
    # a patch of which one cell is valid is seen
    masks["attention_mask"][1, 0, 5, 5] = 1
    assert difference(model(**changed, **masks)[1, :, :, :4], after[1, :, :, :4]) > 1e-5


@pytest.mark.parametrize("sparse_n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 4, 2), (1, 2, 6), (2, 6, 10)])
def test_any_ratio_and_size_is_finite(sparse_n: int, grid: tuple[int, int, int]) -> None:
    """With few tokens whole groups are padding; nothing of it may come out, in either direction."""
    model = make_model(num_layers=4, sparse_n=sparse_n)
    inputs = make_inputs(grid=grid)
    inputs["hidden_states"].requires_grad_()
    mask = torch.ones(2, *grid)
    mask[1, :, :, 2:] = 0
    for given in (None, mask, torch.zeros_like(mask)):
        output = model(**inputs, attention_mask=given)
        assert output.shape == inputs["hidden_states"].shape and output.isfinite().all()
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs["hidden_states"])
        assert gradient.isfinite().all()


def original_mask_weights(mask: Tensor, k: int, pattern: str, scores: Tensor) -> Tensor:
    """Weights of the keys of each query as the original has them: -10000 for hidden keys and -9980 for padding."""
    n = mask.shape[0]
    group, _ = ops.skiparse_index(n, k, pattern)
    members = ops.skiparse_padded_length(n, k) // k
    weights = torch.zeros(n, n, dtype=scores.dtype)
    for g in range(k):
        inside = group == g
        padding = torch.full((int(inside.sum()), members - int(inside.sum())), -9980.0, dtype=scores.dtype)
        biased = scores[inside][:, inside] - 10000.0 * (~mask[inside])
        rows = torch.cat((biased, padding), 1).softmax(1)[:, : int(inside.sum())]
        weights[inside] = weights[inside].masked_scatter(inside.expand(len(rows), -1), rows)
    return weights


@pytest.mark.parametrize("pattern", ["single", "group"])
@pytest.mark.parametrize(("n", "k"), [(16, 2), (18, 3), (27, 3), (10, 4), (12, 1)])
def test_hidden_groups_come_out_as_in_the_original(n: int, k: int, pattern: str) -> None:
    torch.manual_seed(n + k)
    group, _ = ops.skiparse_index(n, k, pattern)
    mask = torch.rand(n) < 0.6
    mask[group == 0] = False  # one group that sees nothing
    q, key = torch.randn(2, 1, n, 1, 4, dtype=torch.float64)
    scores = q[0, :, 0] @ key[0, :, 0].T / 2
    expected = original_mask_weights(mask, k, pattern, scores)
    shown = visible_keys(mask[None], k, pattern)
    values = torch.eye(n, dtype=torch.float64).view(1, n, 1, n)
    q, key = (torch.nn.functional.pad(t, (0, n - 4)) if n > 4 else t for t in (q, key))
    ours = ops.skiparse_attention(q, key, values, sparse_n=k, pattern=pattern, mask=shown, scale=0.5)
    torch.testing.assert_close(ours[0, :, 0], expected, rtol=1e-6, atol=1e-6)  # exp(-20) is not quite 0


def test_text_without_a_visible_token_is_seen_whole() -> None:
    """As the original, whose bias is then the same for all tokens."""
    model, inputs = make_model(), make_inputs()
    hidden = model(**inputs, encoder_attention_mask=torch.zeros(2, 5))
    torch.testing.assert_close(hidden, model(**inputs), rtol=1e-5, atol=1e-5)


# Forward


def test_samples_of_a_batch_are_independent() -> None:
    model, inputs = make_model(**GROUPED), make_inputs(batch=3)
    mask, text_mask = torch.ones(3, 3, 6, 6), torch.ones(3, 5)
    mask[1, 2], text_mask[2, 1:] = 0, 0
    inputs |= {"attention_mask": mask, "encoder_attention_mask": text_mask}
    together = model(**inputs)
    for row in range(3):
        alone = model(**{name: t[row : row + 1] for name, t in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_skiparse_matters_where_it_should() -> None:
    inputs = make_inputs()
    sparse, dense = make_model(**GROUPED), make_model(**GROUPED, sparse1d=False)
    assert difference(sparse(**inputs), dense(**inputs)) > 1e-3
    assert torch.equal(make_model(num_layers=6, sparse_n=1)(**inputs), dense(**inputs))
    # the first two layers are dense
    assert torch.equal(make_model(num_layers=2)(**inputs), make_model(num_layers=2, sparse1d=False)(**inputs))


def test_interpolation_scales_are_kept_apart() -> None:
    """Also where axes have the same length, which the original confuses."""
    inputs = make_inputs(grid=(3, 6, 6))
    outputs = [
        make_model(**{f"interpolation_scale_{axis}": 2.0})(**inputs) for axis in ("t", "h", "w")
    ] + [make_model()(**inputs)]  # fmt: skip
    for i, a in enumerate(outputs):
        assert all(difference(a, b) > 1e-4 for b in outputs[:i])


def test_original_axes_of_size_one_are_taken() -> None:
    model, inputs = make_model(), make_inputs()
    text_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    shaped = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].unsqueeze(1)}
    original = model(**shaped, encoder_attention_mask=text_mask.unsqueeze(1))
    assert torch.equal(original, model(**inputs, encoder_attention_mask=text_mask))


def test_timesteps_may_be_integers() -> None:
    model, inputs = make_model(), make_inputs()
    integers = model(**{**inputs, "timestep": torch.tensor([7, 999])})
    assert torch.equal(integers, model(**{**inputs, "timestep": torch.tensor([7.0, 999.0])}))


def test_low_precision_is_near() -> None:
    model, inputs = make_model(std=0.1), make_inputs()
    exact = model(**inputs)
    low = make_model(std=0.1).bfloat16()(**inputs)
    assert low.dtype == torch.bfloat16 and (low.float() - exact).std() < 0.05 * exact.std()
    wide = make_model(std=0.1).double()(**{name: t.double() for name, t in inputs.items()})
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), exact, rtol=1e-4, atol=1e-5)


BAD_INPUTS = {
    "channels": ({"hidden_states": torch.zeros(2, 3, 3, 6, 6)}, "hidden_states must be .batch, 4, frames"),
    "odd height": ({"hidden_states": torch.zeros(2, 4, 3, 5, 6)}, "multiples of 2"),
    "no frames": ({"hidden_states": torch.zeros(2, 4, 0, 6, 6)}, "hidden_states"),
    "rank": ({"hidden_states": torch.zeros(2, 4, 6, 6)}, "hidden_states"),
    "timestep": ({"timestep": torch.zeros(3)}, r"timestep must be \(2,\), got \(3,\)"),
    "text width": ({"encoder_hidden_states": torch.zeros(2, 5, 21)}, "encoder_hidden_states"),
    "text rank": ({"encoder_hidden_states": torch.zeros(2, 2, 5, 20)}, "encoder_hidden_states"),
    "mask": ({"attention_mask": torch.zeros(2, 3, 3, 3)}, "attention_mask"),
    "text mask": ({"encoder_attention_mask": torch.zeros(2, 4)}, "encoder_attention_mask"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_named(case: str) -> None:
    changes, message = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=f"OpenSoraT2V_v1_3: .*{message}"):
        make_model()(**{**make_inputs(), **changes})
    with pytest.raises(ValueError, match="OpenSoraInpaint_v1_3: hidden_states must be .batch, 12, frames"):
        make_model("tiny_i2v")(**make_inputs())


# Inpainting


def test_inpainting_starts_from_text_to_video() -> None:
    torch.manual_seed(0)
    t2v, i2v = OpenSoraT2V_v1_3(preset("tiny")).eval(), OpenSoraInpaint_v1_3(preset("tiny_i2v")).eval()
    report = i2v.load_state_dict(t2v.state_dict(), strict=False)
    assert not report.unexpected_keys and len(report.missing_keys) == 6
    inputs = make_inputs(channels=12)
    plain = t2v(**{**inputs, "hidden_states": inputs["hidden_states"][:, :4]})
    torch.testing.assert_close(i2v(**inputs), plain)


def test_all_channels_of_inpainting_are_read() -> None:
    model, inputs = make_model("tiny_i2v"), make_inputs(channels=12)
    output = model(**inputs)
    assert output.shape == (2, 4, 3, 6, 6)
    for channel in range(12):
        changed = inputs["hidden_states"].clone()
        changed[:, channel] += 1
        assert difference(model(**{**inputs, "hidden_states": changed}), output) > 1e-4, channel


# Files


@pytest.mark.parametrize("name", ["tiny", "tiny_i2v"])
def test_folder_round_trip(tmp_path: Path, name: str) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path, max_shard_bytes=100_000)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    inputs = make_inputs(channels=model.config.input_channels)
    assert torch.equal(again(**inputs), model(**inputs))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_class_name"] == type(model).__name__ and written["activation_fn"] == "gelu-approximate"


def test_folder_of_the_original(tmp_path: Path) -> None:
    """Its config.json has all fields of its class, and two of the library."""
    model = make_model()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {
        "_diffusers_version": "0.30.2",
        "sample_size_t": 24,
        "sample_size_h": [80, 80],
        "sample_size_w": [80, 80],
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert torch.equal(OpenSoraT2V_v1_3.from_pretrained(tmp_path)(**make_inputs()), model(**make_inputs()))
    with pytest.raises(ValueError, match="describes a OpenSoraT2V_v1_3, wanted a OpenSoraInpaint_v1_3"):
        OpenSoraInpaint_v1_3.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_mindspeed_mm_names(tmp_path: Path, wrapper: str | None) -> None:
    model = make_model()
    theirs = {ours: theirs for theirs, ours in MINDSPEED_MM_PARTS.items()}

    def rename(key: str) -> str:
        if not key.startswith("transformer_blocks."):
            return key
        for ours, name in theirs.items():
            key = key.replace(f".{ours}.", f".{name}.")
        return key.replace("transformer_blocks", MINDSPEED_MM_BLOCKS)

    state = {rename(key): t for key, t in model.state_dict().items()}
    assert f"{MINDSPEED_MM_BLOCKS}.3.cross_atten.proj_out.bias" in state and "proj_out.weight" in state
    torch.save({wrapper: state} if wrapper else state, tmp_path / "model.pt")
    again = OpenSoraT2V_v1_3.from_pretrained(tmp_path / "model.pt", config=model.config)
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())


def test_lost_weights_are_named(tmp_path: Path) -> None:
    state = make_model().state_dict()
    del state["transformer_blocks.1.attn2.to_k.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"1 missing:\s+transformer_blocks.1.attn2.to_k.bias"):
        OpenSoraT2V_v1_3.from_pretrained(tmp_path / "model.pt", config=preset("tiny"))


# Training


def gradients(model: OpenSoraT2V_v1_3, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_is_trained() -> None:
    model = make_model("tiny_i2v").train()
    grads = gradients(model, make_inputs(channels=12))
    # softmax does not see what all keys have in common; rotation makes it seen between tokens of the video
    unseen = {name for name in grads if name.endswith("attn2.to_k.bias")}
    assert len(grads) == len(list(model.parameters()))
    assert all(grads[name].abs().max() > 1e-8 for name in grads.keys() - unseen)
    assert all(grads[name].abs().max() < 1e-6 for name in unseen)


def test_checkpointing_changes_no_gradient() -> None:
    model, inputs = make_model(**GROUPED).train(), make_inputs()
    inputs["attention_mask"] = torch.ones(2, 3, 6, 6)
    plain = gradients(model, inputs)
    model.gradient_checkpointing = True
    calls: list[int] = []
    model.transformer_blocks[3].register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, inputs)
    assert len(calls) == 2
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_initial_weights_follow_the_original() -> None:
    model = OpenSoraInpaint_v1_3(preset("small_i2v"))
    width = model.config.hidden_size
    for name, t in model.state_dict().items():
        if name.endswith("scale_shift_table"):
            assert 0.85 < t.std() * width**0.5 < 1.15, name
        elif name in ("pos_embed_mask.1.weight", "pos_embed_masked_hidden_states.1.weight"):
            assert not t.any(), name
        elif t.dim() > 1:
            assert 0.9 < t.std() * (3 * t[0].numel()) ** 0.5 < 1.1, name
    draws = []
    for seed in (0, 0, 1):
        model.init_weights(torch.Generator().manual_seed(seed))
        draws.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_loss_falls() -> None:
    """On two latents at fixed timesteps; 0.1 of the first loss is far below what the mean of the target gives."""
    torch.manual_seed(0)
    model = OpenSoraT2V_v1_3(preset("tiny")).train()
    inputs = make_inputs(grid=(2, 4, 4))
    latents, noise = inputs.pop("hidden_states"), torch.randn(2, 4, 2, 4, 4)
    text = inputs["encoder_hidden_states"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = v_prediction_loss(
            lambda x, t: model(x, t, text),
            latents,
            alphas_cumprod=open_sora_plan_alphas_cumprod(),
            noise=noise,
            timesteps=torch.tensor([300, 600]),
            snr_gamma=5.0,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
