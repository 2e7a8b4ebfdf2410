# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of CogVideoX 1.0 and 1.5, driven by each case's own json.

Transformer tensors are stored as (batch, frames, channels, height, width); ours have the channels first.
"""

from __future__ import annotations

import re
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


def autoencoder(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from vidgen.models.autoencoders.cogvideox_vae import AutoencoderKLCogVideoX, CogVideoXVAEConfig

    vae = AutoencoderKLCogVideoX(loading.load(CogVideoXVAEConfig, config)).eval()
    vae.load_state_dict(weights, strict=True)
    return vae


@torch.no_grad()
def vae(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders.causal import split_moments
    from vidgen.models.autoencoders.cogvideox_vae import DiffusersTiling

    model, inputs = autoencoder(case.meta["config"], case.group("w/")), case.group("in/")
    tiling = None
    if stated := case.meta.get("tiling"):
        tiling = DiffusersTiling(
            stated["tile_sample_min_height"],
            stated["tile_sample_min_width"],
            stated["tile_overlap_factor_height"],
            stated["tile_overlap_factor_width"],
        )
    for name, value in inputs.items():
        kind, _, suffix = name.partition("_")
        suffix = f"_{suffix}" if suffix else ""
        if kind == "video" and tiling is not None:
            compare(f"moments{suffix}_tiled", model.encode_moments(value, diffusers_tiling=tiling))
            compare(f"moments{suffix}_untiled", model.encode_moments(value))
        elif kind == "video":
            moments = model.encode_moments(value)
            mean, logvar = split_moments(moments)
            compare(f"moments{suffix}", moments)
            compare(f"mode{suffix}", mean)
            compare(f"std{suffix}", (logvar / 2).exp())
            compare(f"encode{suffix}", model.encode(value), mean * model.config.scaling_factor)
        elif kind == "latent":
            name = f"video{suffix}_tiled" if tiling is not None else f"video{suffix}"
            video = model.decode_unscaled(value, diffusers_tiling=tiling)
            compare(name, video)
            if tiling is None:
                streamed = torch.cat([*model.decode_stream(model.normalize(value))], 2)
                compare(f"{name}, streamed", streamed, video)
        else:
            raise AssertionError(f"{name}: unknown input")
    if "first_chunk_video" in compare.expected:
        first_chunk(model, inputs["latent"], compare)


def first_chunk(model: Any, latent: Tensor, compare: Comparison) -> None:
    """The first batch of frames of a longer video, and what the convolutions keep of it."""
    from vidgen.models.autoencoders.cogvideox_vae_batches import frame_batches
    from vidgen.models.autoencoders.streaming import Stream

    stream = Stream()
    stream.last = False
    _, stop = frame_batches(latent.shape[2], 2)[0]
    (video,) = model.decoder(latent[:, :, :stop], stream)
    compare("first_chunk_video", video)
    compare("first_chunk_cache_conv_in", stream.recall(model.decoder.conv_in))
    compare("first_chunk_cache_mid_resnet0_conv1", stream.recall(model.decoder.mid_block.resnets[0].conv1))


@torch.no_grad()
def vae_blocks(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders.cogvideox_vae_layers import Downsample, SpatialNorm, Upsample
    from vidgen.models.autoencoders.layers import CausalConv3d
    from vidgen.models.autoencoders.streaming import Stream

    weights, inputs = case.group("w/"), case.group("in/")

    def filled(module: Any, name: str) -> Any:
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
        return module

    kernel = weights["causal_conv.conv.weight"]
    conv = filled(CausalConv3d(kernel.shape[1], kernel.shape[0], 3, padding=1), "causal_conv")
    x, stream = inputs["causal_x"], Stream()
    stream.last = False
    compare("causal_full", conv(x, Stream()))
    compare("causal_chunk1", conv(x[:, :, :3], stream))
    compare("causal_cache1", stream.recall(conv))
    compare("causal_chunk2", conv(x[:, :, 3:], stream))

    width, latent_width = weights["spatial_norm.conv_y.conv.weight"].shape[:2]
    groups = re.search(r"groups=(\d+)", case.meta["call"])
    assert groups is not None
    norm = filled(SpatialNorm(width, latent_width, int(groups[1])), "spatial_norm")
    channels = weights["down.conv.weight"].shape[0]
    down, up = filled(Downsample(channels, True), "down"), filled(Upsample(channels, True), "up")
    for name, value in inputs.items():
        kind, _, count = name.rpartition("_")
        if kind == "sn_f":
            compare(f"sn_{count}", norm(value, inputs[f"sn_zq_{count}"]))
        elif kind == "resample":
            compare(f"down_{count}", down(value, Stream()))
            compare(f"up_{count}", up(value, Stream()))


@torch.no_grad()
def sat_vae(case: Case, compare: Comparison) -> None:
    from vidgen.models.autoencoders.cogvideox_vae_checkpoint import convert_state_dict, to_sat

    original, weights, inputs = case.meta["config"], case.group("w/"), case.group("in/")
    widths = [original["ch"] * factor for factor in original["ch_mult"]]
    config = {
        "in_channels": original["in_channels"],
        "out_channels": original["out_ch"],
        "block_out_channels": widths,
        "down_block_types": ["CogVideoXDownBlock3D"] * len(widths),
        "up_block_types": ["CogVideoXUpBlock3D"] * len(widths),
        "latent_channels": original["z_channels"],
        "layers_per_block": original["num_res_blocks"],
        "norm_num_groups": int(case.meta["norm_groups"].split()[0]),
    }
    ours = convert_state_dict({"state_dict": {**weights, "loss.discriminator.weight": torch.zeros(1)}})
    model = autoencoder(config, ours)
    for name, value in inputs.items():
        kind, _, suffix = name.partition("_")
        suffix = f"_{suffix}" if suffix else ""
        if kind == "video":
            compare(f"moments{suffix}", model.encode_moments(value, chunk_frames=None))
        else:
            compare(f"video{suffix}", model.decode_unscaled(value))
    again = to_sat(model.state_dict())
    compare.equal("names of SAT", sorted(again), sorted(weights))
    for key, value in again.items():
        compare(f"to_sat: {key}", value, weights[key])


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "rope": rope,
    "sat_transformer_forward": sat_transformer_forward,
    "sat_vae": sat_vae,
    "transformer_forward": transformer_forward,
    "vae": vae,
    "vae_blocks": vae_blocks,
}
NOT_BUILT = {
    "schedule",
    "sampler",
    "sat_sampler",
    "image_latents",
    "dynamic_guidance",
    "train_loss",
    "pipeline",
    "checkpoint_convert",
}
