# SPDX-License-Identifier: Apache-2.0
"""SparseUMMDiT beyond its golden cases (tests/goldens): size, masks, precision, compilation, foreign checkpoints."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen import config as loading
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT, SparseUMMDiTConfig, preset
from vidgen.models.opensora_plan_v1_5.checkpoint import INERT_LAST_BLOCK, MINDSPEED_MM_LAYERS
from vidgen.nn import modulate, residual_modulate

ORIGINAL = {
    "model_id": "SparseUMMDiT",
    "num_layers": [2, 4, 6, 8, 6, 4, 2],
    "sparse_n": [1, 2, 4, 8, 4, 2, 1],
    "double_ff": True,
    "sparse1d": True,
    "num_heads": 24,
    "head_dim": 128,
    "in_channels": 32,
    "out_channels": 32,
    "timestep_embed_dim": 1024,
    "caption_channels": 2048,
    "pooled_projection_dim": 1280,
    "skip_connection": True,
    "skip_connection_zero_init": True,
    "dropout": 0.0,
    "attention_bias": True,
    "patch_size": 2,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-06,
    "from_pretrained": "model.pt",
}


def make_model(seed: int = 0, std: float = 0.1, **changes: Any) -> SparseUMMDiT:
    """Tiny, with all weights drawn wide enough that every part shows in the output."""
    model = SparseUMMDiT(preset("tiny", **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1 if is_norm_weight(name) else 0))
    return model.eval()


def is_norm_weight(name: str) -> bool:
    return name.endswith("weight") and any(part.startswith("norm") for part in name.split(".")[-2:-1])


def make_inputs(batch: int = 2, grid: tuple[int, int, int] = (3, 6, 6), tokens: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": draw(batch, 4, *grid),
        "timestep": torch.linspace(100, 900, batch),
        "pooled_projections": draw(batch, 12),
        "encoder_hidden_states": draw(batch, tokens, 20),
    }


def gradients(model: SparseUMMDiT, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(**inputs).square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# Size


@pytest.fixture(scope="module")
def released() -> SparseUMMDiT:
    with torch.device("meta"):
        return SparseUMMDiT(preset("released"))


def test_released_parameter_counts(released: SparseUMMDiT) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(released) == 8_504_661_120
    blocks = [block for stage in released.transformer_blocks for block in stage]
    assert [count(block) for block in blocks] == [264_327_680] * 31 + [179_383_808]
    assert count(released.skip_norm_linear) == count(released.skip_norm_linear_enc) == 56_632_320


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released checkpoint, as the reference page lists them."""
    h, e = 3072, 1024
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (h, 32, 2, 2), "patch_embed.proj.bias": (h,)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (h,)

    for name, inputs in (("timestep", e), ("text", 1280)):
        linear(f"time_text_embed.{name}_embedder.linear_1", e, inputs)
        linear(f"time_text_embed.{name}_embedder.linear_2", e, e)
    linear("caption_projection", h, 2048)
    for stage, num_blocks in enumerate((2, 4, 6, 8, 6, 4, 2)):
        for index in range(num_blocks):
            block, last = f"transformer_blocks.{stage}.{index}", (stage, index) == (6, 1)
            for name in ("norm1", "norm2"):
                linear(f"{block}.{name}.linear", 6 * h, e)
                norm(f"{block}.{name}.norm")
            norm(f"{block}.norm1.norm_enc")
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                shapes[f"{block}.attn1.{name}.weight"] = (128,)
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"):
                linear(f"{block}.attn1.{name}", h, h)
            if not last:
                norm(f"{block}.norm2.norm_enc")
                linear(f"{block}.attn1.to_add_out", h, h)
            for name in ("ff",) if last else ("ff", "ff_enc"):
                shapes[f"{block}.{name}.net.0.proj.weight"] = (4 * h, h)
                shapes[f"{block}.{name}.net.2.weight"] = (h, 4 * h)
    for index in range(3):
        linear(f"skip_norm_linear.{index}.1", h, 2 * h)
        linear(f"skip_norm_linear_enc.{index}.1", h, 2 * h)
    norm("norm_final")
    linear("norm_out.linear", 2 * h, e)
    norm("norm_out.norm")
    linear("proj_out", 128, h)
    return shapes


def test_released_names_and_shapes(released: SparseUMMDiT) -> None:
    assert {name: tuple(t.shape) for name, t in released.state_dict().items()} == released_shapes()


# Configuration


def test_config_reads_the_released_json() -> None:
    assert SparseUMMDiTConfig.from_original(ORIGINAL) == preset("released")


def test_config_uses_the_originals_defaults_for_absent_switches() -> None:
    switches = ("double_ff", "sparse1d", "skip_connection", "out_channels")
    config = SparseUMMDiTConfig.from_original({k: v for k, v in ORIGINAL.items() if k not in switches})
    assert (config.double_ff, config.sparse1d, config.skip_connection) == (False, False, False)
    assert config.out_channels == 32
    assert config.stage_ratios == (1,) * 7


def test_config_names_unknown_and_impossible_fields() -> None:
    original = {**ORIGINAL, "num_head": 3, "dropout": 0.1, "explicit_uniform_rope": True}
    with pytest.raises(ValueError) as error:
        SparseUMMDiTConfig.from_original(original)
    for part in ("num_head: unknown name, did you mean num_heads", "dropout must be 0.0", "explicit_uniform_rope"):
        assert part in str(error.value)


def test_config_lists_all_problems() -> None:
    with pytest.raises(ValueError) as error:
        preset("tiny", num_layers=(2, 3), sparse_n=(1, 0, 1), head_dim=24, patch_size_t=2, timestep_embed_dim=3)
    message = str(error.value)
    for part in (
        "odd number of stages",
        "even numbers",
        "same length",
        "sparse_n",
        "head_dim",
        "patch_size_t",
        "even, got 3",
    ):
        assert part in message, part


def test_config_survives_plain_values() -> None:
    config = preset("tiny", norm_cls="rms_norm")
    assert loading.load(SparseUMMDiTConfig, loading.to_dict(config)) == config


def test_preset_names_the_choices() -> None:
    with pytest.raises(ValueError, match="released, tiny, small"):
        preset("huge")


# Forward


def test_masks_of_ones_are_no_masks() -> None:
    model, inputs = make_model(num_layers=(2, 2, 2), sparse_n=(2, 4, 1)), make_inputs()
    ones = {"attention_mask": torch.ones(2, 3, 6, 6), "encoder_attention_mask": torch.ones(2, 1, 5)}
    torch.testing.assert_close(model(**inputs, **ones), model(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_hidden_positions_have_no_effect(dtype: torch.dtype) -> None:
    model, inputs = make_model(sparse_n=(2, 3, 1)), make_inputs()
    mask, text_mask = torch.ones(2, 3, 6, 6), torch.ones(2, 5)
    mask[1, :, 4:] = 0
    mask[1, 0, 3] = 0  # half of a row of patches, which therefore stay visible
    text_mask[0, 3:] = 0
    masks = {"attention_mask": mask.to(dtype), "encoder_attention_mask": text_mask.to(dtype)}
    before = model(**inputs, **masks)
    changed = {name: t.clone() for name, t in inputs.items()}
    changed["hidden_states"][1, :, :, 4:] += 3
    changed["encoder_hidden_states"][0, 3:] += 3
    after = model(**changed, **masks)
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after[1, :, :, :4], before[1, :, :, :4], rtol=1e-6, atol=1e-6)
    # the tokens of that half row are keys of other tokens, whose own patches are elsewhere
    changed["hidden_states"][1, :, 0, 3] += 3
    assert (model(**changed, **masks)[1, :, 1:, :4] - after[1, :, 1:, :4]).abs().max() > 1e-4


def test_original_axes_of_size_one_are_taken() -> None:
    model, inputs = make_model(), make_inputs()
    text_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    shaped = {name: inputs[name].unsqueeze(1) for name in ("pooled_projections", "encoder_hidden_states")}
    original = model(**{**inputs, **shaped}, encoder_attention_mask=text_mask.unsqueeze(1))
    assert torch.equal(original, model(**inputs, encoder_attention_mask=text_mask))


def test_samples_of_a_batch_are_independent() -> None:
    model, inputs = make_model(), make_inputs()
    alone = model(**{name: t[1:] for name, t in inputs.items()})
    torch.testing.assert_close(model(**inputs)[1:], alone, rtol=1e-5, atol=1e-6)


def test_skiparse_off_makes_every_stage_dense() -> None:
    inputs = make_inputs()
    sparse, dense = make_model(sparse_n=(2, 4, 2)), make_model(sparse_n=(2, 4, 2), sparse1d=False)
    assert (sparse(**inputs) - dense(**inputs)).abs().max() > 1e-3
    assert torch.equal(make_model(sparse_n=(1, 1, 1))(**inputs), dense(**inputs))


def test_zero_initialised_skips_have_no_effect() -> None:
    torch.manual_seed(0)
    model = SparseUMMDiT(preset("tiny")).eval()
    without = SparseUMMDiT(preset("tiny", skip_connection=False)).eval()
    assert not any(name.startswith("skip") for name in without.state_dict())
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("skip")})
    inputs = make_inputs()
    torch.testing.assert_close(model(**inputs), without(**inputs), rtol=1e-5, atol=1e-6)


def test_rms_norms_replace_layer_norms() -> None:
    model, inputs = make_model(norm_cls="rms_norm"), make_inputs()
    assert not any(name.endswith(("norm.bias", "norm_enc.bias", "norm_final.bias")) for name in model.state_dict())
    assert model(**inputs).isfinite().all()
    x, shift, scale, gate, y = torch.randn(2, 3, 32), *torch.randn(3, 2, 32), torch.randn(2, 3, 32)
    norm = model.norm_out.norm

    def formula(x: Tensor) -> Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
        return normed * (1 + scale[:, None]) + shift[:, None]

    torch.testing.assert_close(modulate(norm, x, shift, scale), formula(x))
    h, normed = residual_modulate(norm, x, gate, y, shift, scale)
    torch.testing.assert_close(h, x + gate[:, None] * y)
    torch.testing.assert_close(normed, formula(x + gate[:, None] * y))


def test_one_stage_runs_its_blocks_once() -> None:
    model = make_model(num_layers=(2,), sparse_n=(2,))
    calls: list[int] = []
    model.transformer_blocks[0][0].register_forward_hook(lambda *_: calls.append(1))
    model(**make_inputs())
    assert len(calls) == 1


BAD_INPUTS = {
    "channels": ({"hidden_states": torch.zeros(2, 3, 3, 6, 6)}, "hidden_states must be .batch, 4, frames"),
    "odd height": ({"hidden_states": torch.zeros(2, 4, 3, 5, 6)}, "multiples of 2"),
    "no frames": ({"hidden_states": torch.zeros(2, 4, 0, 6, 6)}, "hidden_states"),
    "timestep": ({"timestep": torch.zeros(3)}, r"timestep must be \(2,\), got \(3,\)"),
    "pooled": ({"pooled_projections": torch.zeros(2, 2, 12)}, "pooled_projections"),
    "text width": ({"encoder_hidden_states": torch.zeros(2, 5, 21)}, "encoder_hidden_states"),
    "text rank": ({"encoder_hidden_states": torch.zeros(2, 2, 5, 20)}, "encoder_hidden_states"),
    "mask": ({"attention_mask": torch.zeros(2, 3, 3, 3)}, "attention_mask"),
    "text mask": ({"encoder_attention_mask": torch.zeros(2, 4)}, "encoder_attention_mask"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_named(case: str) -> None:
    changes, message = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=f"SparseUMMDiT: .*{message}|SparseUMMDiT: {message}"):
        make_model()(**{**make_inputs(), **changes})


# Precision


def test_bfloat16_is_as_good_as_its_weights() -> None:
    model, inputs = make_model(), make_inputs()
    exact = model(**inputs)
    low = make_model().bfloat16()
    rounded = make_model()
    rounded.load_state_dict({name: t.float() for name, t in low.state_dict().items()})
    output = low(**inputs)
    assert output.dtype == torch.bfloat16
    scale = exact.std()
    assert (output.float() - exact).std() < 0.05 * scale
    assert (output.float() - rounded(**inputs)).std() < 0.05 * scale


def test_modulations_are_computed_in_float32() -> None:
    norm = make_model().transformer_blocks[0][0].norm1
    condition = torch.randn(2, 32)
    low = make_model().bfloat16().transformer_blocks[0][0].norm1
    expected = F.linear(condition, low.linear.weight.float(), low.linear.bias.float())
    assert torch.equal(torch.cat(low(condition, torch.float32), -1), expected)
    assert [c.shape for c in norm(condition, torch.bfloat16)] == [(2, 32)] * 6


def test_float64_stays_float64() -> None:
    model, inputs = make_model().double(), {name: t.double() for name, t in make_inputs().items()}
    assert model(**inputs).dtype == torch.float64
    torch.testing.assert_close(model(**inputs).float(), make_model()(**make_inputs()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_float16_sampling_saturates_what_overflows() -> None:
    model = make_model().half()
    block = model.transformer_blocks[0][0]
    cos, sin = torch.ones(9, 8), torch.zeros(9, 8)
    x, y, c = torch.randn(1, 9, 32).half(), torch.randn(1, 5, 32).half(), torch.randn(1, 32)
    x[0, :, 3], y[0, 2, 3] = torch.inf, -torch.inf
    rest = (c, {"cos": cos, "sin": sin, "style": "half_per_axis", "sections": (4, 6, 6)}, None, None)
    for a, b in zip(block(x, y, *rest), block(x.clamp(-65504, 65504), y.clamp(-65504, 65504), *rest), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)

    block.attn1.to_out[0].bias[5], block.attn1.to_add_out.bias[5] = torch.inf, torch.inf
    assert all(t.isfinite().all() for t in block(x, y, *rest))
    assert not any(t.isfinite().all() for t in block.train()(x, y, *rest))
    assert model(**make_inputs()).isfinite().all()


# Training


def test_inert_weights_get_zero_gradients() -> None:
    inert = {
        f"transformer_blocks.2.1.attn1.{n}" for n in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    }
    for name, grad in gradients(make_model().train(), make_inputs()).items():
        assert grad is not None, name
        # of the text's modulation in the last block's second half nothing is used, but it shares a tensor with the rest
        assert bool(grad.any()) == (name not in inert), name


def test_checkpointing_changes_no_gradient() -> None:
    model, inputs = make_model().train(), make_inputs()
    plain = gradients(model, inputs)
    model.gradient_checkpointing = True
    calls: list[int] = []
    model.transformer_blocks[1][0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, inputs)
    assert len(calls) == 2
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_seed_decides_the_weights() -> None:
    model = SparseUMMDiT(preset("tiny"))
    draws = []
    for seed in (0, 0, 1):
        model.init_weights(torch.Generator().manual_seed(seed))
        draws.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(5)
    first = SparseUMMDiT(preset("tiny")).state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(t, first[name]) for name, t in SparseUMMDiT(preset("tiny")).state_dict().items())


def test_initial_weights_follow_the_original() -> None:
    state = SparseUMMDiT(preset("small")).state_dict()
    width = 128
    for name, t in state.items():
        parallel = name.startswith(("transformer_blocks", "norm_out.linear"))
        if is_norm_weight(name):
            assert torch.equal(t, torch.ones_like(t)), name
        elif parallel and t.dim() == 2:
            assert 0.018 < t.std() < 0.022, name
        elif parallel or name.startswith("skip") and t.dim() == 1:
            assert not t.any(), name
        elif name.startswith("skip"):
            assert torch.equal(t, torch.eye(width, 2 * width)), name
        elif t.dim() > 1:
            assert 0.9 < t.std() * (3 * t[0].numel()) ** 0.5 < 1.1, name


def test_layer_norm_before_the_skip_linear() -> None:
    model = SparseUMMDiT(preset("tiny", skip_connection_zero_init=False))
    assert model.skip_norm_linear[0][0].weight.shape == (64,)
    assert model.skip_norm_linear_enc[0][1].weight[:, 32:].any()


# Compilation


def test_training_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, inputs = make_model(num_layers=(2,), sparse_n=(2,)).train(), make_inputs(batch=1)
    inputs["attention_mask"] = torch.ones(1, 3, 6, 6).tril()
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 1]])
    expected, output = model(**inputs), torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    eager = torch.autograd.grad(expected.square().mean(), parameters)
    compiled = torch.autograd.grad(output.square().mean(), parameters)
    for name, a, b in zip(names, compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_sampling_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, inputs = make_model(), make_inputs(batch=1)
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(output, model(**inputs), rtol=1e-5, atol=1e-5)


# Checkpoints


def test_foreign_checkpoints_load(tmp_path: Any) -> None:
    """MindSpeed-MM's names, the wrapper of a training checkpoint, and what tensor-parallel training leaves behind."""
    model = make_model()
    state: dict[str, Any] = {}
    renamed = {ours: theirs for theirs, ours in MINDSPEED_MM_LAYERS.items()}
    for key, value in model.state_dict().items():
        block, attention, layer = key.partition("attn1.")
        name, dot, leaf = layer.rpartition(".")
        state[block + attention + renamed[name] + dot + leaf if attention else key] = value
    assert "transformer_blocks.0.0.attn1.added_proj_q.weight" in state
    state |= {f"transformer_blocks.2.1.{name}": torch.zeros(3) for name in INERT_LAST_BLOCK}
    state["transformer_blocks.0.0.attn1.proj_q._extra_state"] = None
    torch.save({"model": state, "iteration": 3}, tmp_path / "model.pt")
    loaded = SparseUMMDiT.from_pretrained(tmp_path / "model.pt", config=model.config)
    inputs = make_inputs()
    assert torch.equal(loaded(**inputs), model(**inputs))
    state["transformer_blocks.1.1.ff_enc.net.1.weight"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="1 unexpected:\n *transformer_blocks.1.1.ff_enc.net.1.weight"):
        SparseUMMDiT.from_pretrained(tmp_path / "model.pt", config=model.config)


def test_folder_round_trip(tmp_path: Any) -> None:
    model, inputs = make_model(double_ff=False, norm_cls="rms_norm"), make_inputs()
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    again = SparseUMMDiT.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again(**inputs), model(**inputs))
