# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of CogVideoX 1.0 and 1.5, driven by each case's own json.

Transformer tensors are stored as (batch, frames, channels, height, width); ours have the channels first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidgen import config as loading

from .comparison import Case, Comparison


def swap(x: Tensor) -> Tensor:
    """Between frames first and channels first."""
    return x.transpose(1, 2)


def transformer(config: dict[str, Any], weights: dict[str, Tensor], **changes: Any) -> Any:
    from vidgen.models.cogvideox import CogVideoXConfig, CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(loading.load(CogVideoXConfig, {**config, **changes})).eval()
    model.load_state_dict(weights, strict=True)
    return model


def transformer_forward(case: Case, compare: Comparison) -> None:
    # The original's way with frame counts other than the learned table's.
    model = transformer(case.meta["config"], case.group("w/"), learned_positions="sincos")
    inputs = case.group("in/")
    suffixes = sorted(name.removeprefix("hidden_states") for name in inputs if name.startswith("hidden_states"))
    for index, suffix in enumerate(suffixes):
        rope = case.meta["rope"][index] if case.meta["rope"] else None
        latent, text = swap(inputs[f"hidden_states{suffix}"]), inputs[f"encoder_hidden_states{suffix}"]
        timestep, ofs = inputs[f"timestep{suffix}"], inputs.get(f"ofs{suffix}")
        options = {} if ofs is None else {"ofs": ofs}
        rotary = None if rope is None else described_rotation(rope, model.config.attention_head_dim)
        if rotary is not None:
            for name, table in zip(("cos", "sin"), rotary, strict=True):
                stored = inputs[f"rope_{name}{suffix}"]
                compare(f"rope_{name}{suffix}", table.repeat_interleave(2, 1), stored)
        blocks: list[tuple[Tensor, Tensor]] = []
        hook = model.transformer_blocks[0].register_forward_hook(lambda m, i, o, blocks=blocks: blocks.append(o))
        with torch.no_grad():
            sample = model(latent, timestep, text, rotary=rotary, **options)
            video_tokens, text_tokens = model.patch_embed(latent, text)
            condition = model.condition(timestep, **options)
            own = model.rotation(case_grid(model, latent), 0, latent, None)
            if rotary is not None and all(
                torch.allclose(own[k], t) for k, t in zip(("cos", "sin"), rotary, strict=True)
            ):
                compare(
                    f"sample{suffix} with its own rotation",
                    swap(model(latent, timestep, text, **options)),
                    swap(sample),
                )
        hook.remove()
        compare(f"sample{suffix}", swap(sample))
        compare(f"temb{suffix}", condition)
        compare(f"tokens_after_patch_embed{suffix}", torch.cat([text_tokens, video_tokens], 1))
        compare(f"block0_video{suffix}", blocks[0][0])
        compare(f"block0_text{suffix}", blocks[0][1])


def case_grid(model: Any, latent: Tensor) -> tuple[int, int, int]:
    from vidgen.models.cogvideox.patches import patch_grid

    return patch_grid(latent, model.config.patch)


def described_rotation(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, Tensor]:
    """The table that a case says it was run with, from the crop that it states."""
    from vidgen import ops
    from vidgen.models.cogvideox.positions import linspace_positions

    sections = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    if rope["grid_type"] == "slice":
        return ops.rope_3d_table(rope["grid"], sections)
    crop = tuple(tuple(corner) for corner in rope["crops_coords"])
    return ops.rope_3d_table(linspace_positions(tuple(rope["grid"]), crop), sections)


def rope(case: Case, compare: Comparison) -> None:
    from vidgen.models.cogvideox.positions import resized_crop, rotary_table

    for name, entry in case.meta["grids"].items():
        height, width = entry["base_sample_latent_hw"]
        frames, *size = entry["latent_t_h_w"]
        frames_in_patch = entry["patch_size_t"] or 1
        grid, base = (-(-frames // frames_in_patch), size[0] // 2, size[1] // 2), (height // 2, width // 2)
        compare.equal(f"{name}: grid", list(grid), list(entry["grid"]))
        if "crops_coords" in entry:
            compare.equal(
                f"{name}: crop", [list(corner) for corner in resized_crop(grid[1:], base)], entry["crops_coords"]
            )
        unit = entry["head_dim"] // 8
        tables = rotary_table(grid, base, (2 * unit, 3 * unit, 3 * unit), entry["grid_type"])
        for part, table in zip(("cos", "sin"), tables, strict=True):
            compare(f"{name}_{part}", table.repeat_interleave(2, 1))


def sat_transformer_forward(case: Case, compare: Comparison) -> None:
    from vidgen.models.cogvideox import CogVideoXConfig
    from vidgen.models.cogvideox.checkpoint import convert_state_dict, fit_state_dict, ignored_keys, to_sat

    weights, inputs = case.group("w/"), case.group("in/")
    ours = convert_state_dict({"module": weights})
    latent = swap(torch.cat([t for t in (inputs["x"], inputs.get("concat_images")) if t is not None], 2))
    options = {"ofs": inputs["ofs"]} if "ofs" in inputs else {}
    sat = {"norm_out_eps": 1e-6}
    diffusers = {"norm_out_eps": 1e-5, "learned_positions": "sincos"}
    for name, changes in (("sample", sat), ("sample_diffusers_from_converted", diffusers)):
        config = loading.load(CogVideoXConfig, case.meta["diffusers_config"])
        state = {key: value for key, value in fit_state_dict(ours, config).items() if key not in ignored_keys(config)}
        model = transformer(case.meta["diffusers_config"], state, **changes)
        with torch.no_grad():
            compare(name, swap(model(latent, inputs["timesteps"], inputs["context"], **options)))
    again = to_sat(model.state_dict())
    tables = {key for key in weights.keys() - again.keys() if "pos_embed" in key or "position_embeddings" in key}
    compare.equal("names of SAT", sorted(again), sorted(weights.keys() - tables))
    for key, value in again.items():
        compare(f"to_sat: {key}", value, weights[key])


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "rope": rope,
    "sat_transformer_forward": sat_transformer_forward,
    "transformer_forward": transformer_forward,
}
NOT_BUILT = {
    "vae",
    "vae_blocks",
    "sat_vae",
    "schedule",
    "sampler",
    "sat_sampler",
    "image_latents",
    "dynamic_guidance",
    "train_loss",
    "pipeline",
    "checkpoint_convert",
}
