# SPDX-License-Identifier: Apache-2.0
"""MMDiT beyond its golden cases (tests/goldens): size, layouts, symmetries, precision, foreign checkpoints."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vidgen.models.opensora_v2 import MMDiT, MMDiTConfig, preset, to_release_layout
from vidgen.models.opensora_v2.embeddings import timestep_embedding
from vidgen.nn import pack_patches, patch_positions, unpack_patches

ORIGINAL = {
    "type": "flux",
    "from_pretrained": "Open_Sora_v2.safetensors",
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
    "in_channels": 64,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "cond_embed": True,
    "grad_ckpt_settings": [100, 100],
}
GRID = (3, 2, 3)


def make_model(name: str = "tiny", seed: int = 0, **changes: Any) -> MMDiT:
    """Tiny, with all weights drawn wide enough that every part shows in the output."""
    model = MMDiT(preset(name, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (1 if key.endswith("scale") else 0))
    return model.eval()


def make_inputs(
    config: MMDiTConfig, batch: int = 2, grid: tuple[int, int, int] = GRID, text: int = 5
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = grid[0] * grid[1] * grid[2]
    inputs = {
        "img": draw(batch, tokens, config.in_channels),
        "img_ids": patch_positions(grid),
        "txt": draw(batch, text, config.context_in_dim),
        "txt_ids": torch.zeros(text, 3),
        "timesteps": torch.linspace(0.2, 0.9, batch),
        "y_vec": draw(batch, config.vec_in_dim),
    }
    if config.cond_embed:
        inputs["cond"] = draw(batch, tokens, config.cond_channels)
    if config.guidance_embed:
        inputs["guidance"] = torch.linspace(1.0, 4.0, batch)
    return inputs


def gradients(model: MMDiT, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# Size


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"), [("released", 11_891_390_528, 1082), ("flux_dev", 11_901_408_320, 780)]
)
def test_parameter_counts(name: str, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = MMDiT(preset(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors and not list(model.buffers())


# Configuration


def test_config_reads_the_originals() -> None:
    assert MMDiTConfig.from_original(ORIGINAL) == preset("released")
    switches = ("guidance_embed", "cond_embed", "fused_qkv", "use_liger_rope")
    rest = {name: value for name, value in ORIGINAL.items() if name not in switches}
    assert MMDiTConfig.from_original({**rest, "guidance_embed": True}) == preset("flux_dev")


def test_config_names_everything_wrong() -> None:
    bad = {name: value for name, value in ORIGINAL.items() if name != "depth"}
    with pytest.raises(ValueError, match=r"depth is missing.*type must be 'flux'.*qkv_biass"):
        MMDiTConfig.from_original({**bad, "type": "dit", "qkv_biass": True})
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple.*in_channels must be a multiple"):
        preset("tiny", hidden_size=33, in_channels=15)
    with pytest.raises(ValueError, match="axes_dim must add up to hidden_size / num_heads = 8"):
        preset("tiny", num_heads=4)
    with pytest.raises(ValueError, match="depth must not be negative"):
        preset("tiny", depth=-1)
    with pytest.raises(ValueError, match="no configuration 'huge'"):
        preset("huge")


# Layouts


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("halves", [True, False])
def test_release_layout_computes_the_same(fused: bool, halves: bool) -> None:
    model = make_model(guidance_embed=True, fused_qkv=fused, use_liger_rope=halves, num_heads=2).double()
    inputs = {name: t.double() for name, t in make_inputs(model.config).items()}
    state, config = to_release_layout(model.state_dict(), model.config)
    assert not config.fused_qkv and config.use_liger_rope
    other = MMDiT(config).double()
    other.load_state_dict(state)
    wanted = model(**inputs)
    # one form of the table is made in float32, the other in float64
    torch.testing.assert_close(other(**inputs), wanted, rtol=1e-5, atol=1e-5)
    if not halves:  # the test sees the order of channels
        wrong = MMDiT(config).double()
        wrong.load_state_dict({**state, **{k: t for k, t in model.state_dict().items() if k.endswith("scale")}})
        assert (wrong(**inputs) - wanted).abs().max() > 1e-2


# Against diffusers


def flux_state(state: dict[str, Tensor], config: MMDiTConfig) -> dict[str, Tensor]:
    """Weights in Flux's own layout under the names that diffusers gives them."""
    width, result = config.hidden_size, {}
    embedders = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
    plain = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    plain |= {
        f"{ours}.{place}_layer": f"time_text_embed.{theirs}.linear_{n}"
        for ours, theirs in embedders.items()
        for place, n in (("in", 1), ("out", 2))
    }
    streams = {
        "img": ("norm1", "attn.to_{}", "attn.norm_{}", "attn.to_out.0", "ff"),
        "txt": ("norm1_context", "attn.add_{}_proj", "attn.norm_added_{}", "attn.to_add_out", "ff_context"),
    }
    for i in range(config.depth):
        for stream, (norm, projection, qk_norm, out, ff) in streams.items():
            ours, theirs = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            plain |= {f"{ours}_mod.lin": f"{theirs}.{norm}.linear", f"{ours}_attn.proj": f"{theirs}.{out}"}
            plain |= {f"{ours}_mlp.0": f"{theirs}.{ff}.net.0.proj", f"{ours}_mlp.2": f"{theirs}.{ff}.net.2"}
            for leaf in ("weight", "bias"):
                for letter, part in zip("qkv", state[f"{ours}_attn.qkv.{leaf}"].chunk(3), strict=True):
                    result[f"{theirs}.{projection.format(letter)}.{leaf}"] = part
            for letter, name in (("q", "query"), ("k", "key")):
                result[f"{theirs}.{qk_norm.format(letter)}.weight"] = state[f"{ours}_attn.norm.{name}_norm.scale"]
    for i in range(config.depth_single_blocks):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        plain |= {f"{ours}.modulation.lin": f"{theirs}.norm.linear", f"{ours}.linear2": f"{theirs}.proj_out"}
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        for leaf in ("weight", "bias"):
            parts = state[f"{ours}.linear1.{leaf}"].split((width, width, width, config.mlp_hidden_size))
            result |= {f"{theirs}.{name}.{leaf}": part for name, part in zip(names, parts, strict=True)}
        for letter, name in (("q", "query"), ("k", "key")):
            result[f"{theirs}.attn.norm_{letter}.weight"] = state[f"{ours}.norm.{name}_norm.scale"]
    for leaf in ("weight", "bias"):
        result |= {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for ours, theirs in plain.items()}
        shift, scale = state[f"final_layer.adaLN_modulation.1.{leaf}"].chunk(2)
        result[f"norm_out.linear.{leaf}"] = torch.cat((scale, shift))
    return result


@pytest.mark.parametrize(
    ("grid", "text", "depths"), [((1, 4, 3), 5, (2, 2)), ((3, 2, 5), 1, (1, 3)), ((2, 1, 1), 9, (3, 0))]
)
@torch.no_grad()
def test_flux_layout_is_the_flux_of_diffusers(grid: tuple[int, int, int], text: int, depths: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    changes = {"guidance_embed": True, "fused_qkv": True, "use_liger_rope": False}
    model = make_model(depth=depths[0], depth_single_blocks=depths[1], **changes).double()
    theirs = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=depths[0], num_single_layers=depths[1], attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).double()  # fmt: skip
    theirs.load_state_dict(flux_state(model.state_dict(), model.config))
    inputs = make_inputs(model.config, grid=grid, text=text)
    names = {"img": "hidden_states", "txt": "encoder_hidden_states", "y_vec": "pooled_projections"}
    wanted = theirs(
        **{theirs: inputs[ours].double() for ours, theirs in names.items()},
        timestep=inputs["timesteps"], guidance=inputs["guidance"], img_ids=inputs["img_ids"],
        txt_ids=inputs["txt_ids"], return_dict=False,
    )[0]  # fmt: skip
    # diffusers makes sinusoids in float32 whatever the model's dtype; float32 timesteps make us do the same
    ours = model(**{name: t.double() if name in names else t for name, t in inputs.items()})
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


# What the model is invariant to


def test_text_has_no_order_and_video_only_its_positions() -> None:
    model = make_model("tiny_i2v")
    inputs = make_inputs(model.config)
    wanted = model(**inputs)
    torch.testing.assert_close(model(**{**inputs, "txt": inputs["txt"].flip(1)}), wanted, rtol=1e-4, atol=1e-5)
    order = torch.randperm(wanted.shape[1], generator=torch.Generator().manual_seed(0))
    moved = {**inputs, "img": inputs["img"][:, order], "cond": inputs["cond"][:, order]}
    shuffled = model(**{**moved, "img_ids": inputs["img_ids"][order]})
    torch.testing.assert_close(shuffled, wanted[:, order], rtol=1e-4, atol=1e-5)
    assert (model(**moved) - wanted[:, order]).abs().max() > 1e-2


def test_every_input_matters() -> None:
    model = make_model("tiny_i2v", guidance_embed=True)
    inputs = make_inputs(model.config)
    wanted = model(**inputs)
    for name in ("img", "txt", "timesteps", "y_vec", "cond", "guidance", "img_ids"):
        changed = inputs[name] * 1.3 + 0.1
        assert (model(**{**inputs, name: changed}) - wanted).abs().max() > 1e-3, name


def test_ids_for_each_sample() -> None:
    model = make_model()
    inputs = make_inputs(model.config)
    each = {name: inputs[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    torch.testing.assert_close(model(**{**inputs, **each}), model(**inputs))


def test_zero_condition_of_a_new_model_changes_nothing() -> None:
    """The projection starts at zero, so that training goes on from a model without it."""
    plain, conditioned = MMDiT(preset("tiny")), MMDiT(preset("tiny_i2v"))
    conditioned.load_state_dict(plain.state_dict(), strict=False)
    inputs = make_inputs(conditioned.config)
    without = {name: t for name, t in inputs.items() if name != "cond"}
    assert torch.equal(conditioned(**inputs), plain(**without))


# Timesteps


def test_timesteps_are_scaled_in_their_own_dtype() -> None:
    t = torch.tensor([0.3], dtype=torch.bfloat16)  # 0.30078125 as bfloat16; times 1000 it is rounded again, to 300
    torch.testing.assert_close(timestep_embedding(t, 256), timestep_embedding(torch.tensor([0.3]), 256).bfloat16())
    assert not torch.equal(timestep_embedding(t, 256), timestep_embedding(t.float(), 256).bfloat16())
    assert timestep_embedding(torch.ones(3), 7).shape == (3, 7)
    assert timestep_embedding(torch.ones(3), 7)[:, -1].eq(0).all()


# Memory and precision


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = make_model("tiny_i2v")
    inputs = make_inputs(model.config)
    wanted = gradients(model, inputs)
    calls: list[str] = []
    for name, block in (*model.double_blocks.named_children(), *model.single_blocks.named_children()):
        kind = type(block).__name__[0] + name
        block.register_forward_pre_hook(lambda module, inputs, kind=kind: calls.append(kind))
    twice = {False: set(), True: {"D0", "D1", "S0", "S1"}, (1, 0): {"D0"}, (0, 2): {"S0", "S1"}}
    for setting, names in twice.items():
        model.gradient_checkpointing = setting
        calls.clear()
        for name, grad in gradients(model, inputs).items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-6)
        assert {kind for kind in calls if calls.count(kind) == 2} == names, setting


def test_bfloat16_is_close() -> None:
    model = make_model("tiny_i2v")
    inputs = make_inputs(model.config)
    half = {name: t if name.endswith("ids") else t.bfloat16() for name, t in inputs.items()}
    exact = {name: t if name == "timesteps" else t.float() for name, t in half.items()}
    reference = model(**exact)
    ours = model.bfloat16()(**half)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - reference).norm() < 0.05 * reference.norm()


def test_every_parameter_has_a_gradient() -> None:
    for name, changes in (("tiny_i2v", {}), ("tiny", {"fused_qkv": True, "guidance_embed": True, "qkv_bias": False})):
        model = make_model(name, **changes)
        grads = gradients(model, make_inputs(model.config))
        assert not [key for key, grad in grads.items() if grad is None or not grad.any()]


def test_training_compiles_as_one_graph() -> None:
    model = make_model("tiny_i2v", depth=1, depth_single_blocks=1)
    inputs = make_inputs(model.config)
    wanted, output = model(**inputs), torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(output, wanted)
    parameters = list(model.parameters())
    eager = torch.autograd.grad(wanted.square().mean(), parameters)
    for a, b in zip(torch.autograd.grad(output.square().mean(), parameters), eager, strict=True):
        torch.testing.assert_close(a, b)


# Files


def test_save_and_load(tmp_path: Any) -> None:
    model = make_model("tiny_i2v")
    inputs = make_inputs(model.config)
    model.save_pretrained(tmp_path / "folder")
    again = MMDiT.from_pretrained(tmp_path / "folder")
    assert again.config == model.config and torch.equal(again(**inputs), model(**inputs))
    torch.save({"model": model.state_dict() | {"double_blocks.0._extra_state": None}}, tmp_path / "wrapped.pt")
    wrapped = MMDiT.from_pretrained(tmp_path / "wrapped.pt", config=model.config)
    assert torch.equal(wrapped(**inputs), model(**inputs))
    state = model.state_dict()
    state["cond_inn.weight"] = state.pop("cond_in.weight")
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"cond_in.weight \(nearest: cond_inn.weight\)"):
        MMDiT.from_pretrained(tmp_path / "bad.pt", config=model.config)


# Bad inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img": torch.zeros(2, 18, 15)}, r"img must be \(2, tokens, 16\)"),
        ({"txt": torch.zeros(1, 5, 20)}, r"txt must be \(2, tokens, 20\)"),
        ({"img_ids": torch.zeros(17, 3)}, r"img_ids must be \(18, 3\)"),
        ({"txt_ids": torch.zeros(2, 5, 3)}, "txt_ids must be"),
        ({"timesteps": torch.zeros(3)}, r"timesteps must be \(2,\)"),
        ({"y_vec": torch.zeros(2, 11)}, r"y_vec must be \(2, 12\)"),
        ({"cond": torch.zeros(2, 18, 16)}, r"cond must be \(2, 18, 20\)"),
        ({"cond": None}, "cond_embed=True the model needs cond"),
        ({"guidance": None}, "guidance_embed=True the model needs guidance"),
        ({"guidance": torch.zeros(2, 1)}, r"guidance must be \(2,\)"),
    ],
)
def test_bad_inputs_are_named(change: dict[str, Any], message: str) -> None:
    model = make_model("tiny_i2v", guidance_embed=True)
    with pytest.raises(ValueError, match=message):
        model(**{**make_inputs(model.config), **change})


def test_condition_without_its_layer_is_refused() -> None:
    model = make_model("tiny")
    with pytest.raises(ValueError, match="has no layer for cond"):
        model(**make_inputs(model.config), cond=torch.zeros(2, 18, 20))


# Packing


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 3)] * 5), st.sampled_from((1, 2, 3)))
def test_packing_has_an_inverse(sizes: tuple[int, ...], patch: int) -> None:
    batch, channels, *grid = sizes
    latent = torch.randn(batch, channels, grid[0], grid[1] * patch, grid[2] * patch)
    tokens = pack_patches(latent, patch)
    assert tokens.shape == (batch, grid[0] * grid[1] * grid[2], channels * patch**2)
    assert torch.equal(unpack_patches(tokens, grid, patch), latent)
    for token, (t, y, x) in enumerate(patch_positions(grid).long().tolist()):
        cut = latent[:, :, t, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
        assert torch.equal(tokens[:, token], cut.flatten(1))


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of patch_size=2"):
        pack_patches(torch.zeros(1, 4, 1, 3, 4), 2)
    with pytest.raises(ValueError, match=r"tokens of grid \(1, 2, 3\)"):
        unpack_patches(torch.zeros(1, 5, 16), (1, 2, 3), 2)
