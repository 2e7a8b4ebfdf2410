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
from vidgen import diffusion
from vidgen.diffusion.v_prediction import (
    diffuse,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
    shift_snr,
    velocity_target,
)

from . import checkpoints
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
        described = case.meta.get("rope")
        rope = described[index] if isinstance(described, list) and described else described or None
        latent, text = swap(inputs[f"hidden_states{suffix}"]), inputs[f"encoder_hidden_states{suffix}"]
        timestep, ofs = inputs[f"timestep{suffix}"], inputs.get(f"ofs{suffix}")
        options = {} if ofs is None else {"ofs": ofs}
        rotary = None if rope is None else described_rotation(rope, model.config.attention_head_dim)
        if rotary is not None:
            for name, table in zip(("cos", "sin"), rotary, strict=True):
                if (stored := inputs.get(f"rope_{name}{suffix}")) is not None:
                    compare(f"rope_{name}{suffix}", table.repeat_interleave(2, 1), stored)
        elif f"rope_cos{suffix}" in inputs:
            cos, sin = (inputs[f"rope_{name}{suffix}"][:, ::2] for name in ("cos", "sin"))
            rotary = cos, sin
        blocks: list[tuple[Tensor, Tensor]] = []
        hooks = [
            block.register_forward_hook(lambda m, i, o, blocks=blocks: blocks.append(o))
            for block in model.transformer_blocks
        ]
        with torch.no_grad():
            sample = model(latent, timestep, text, rotary=rotary, **options)
            video_tokens, text_tokens = model.patch_embed(latent, text)
            condition = model.condition(timestep, **options)
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            own = model.rotation(case_grid(model, latent), 0, latent, None)
            if rotary is not None and all(
                torch.allclose(own[k], t) for k, t in zip(("cos", "sin"), rotary, strict=True)
            ):
                compare(
                    f"sample{suffix} with its own rotation",
                    swap(model(latent, timestep, text, **options)),
                    swap(sample),
                )
        seen = {"temb": condition, "tokens_after_patch_embed": torch.cat([text_tokens, video_tokens], 1)}
        for number, (video, text) in enumerate(blocks):
            seen |= {f"block{number}_video": video, f"block{number}_text": text}
        compare(f"sample{suffix}", swap(sample))
        for name in seen.keys() & {name.removesuffix(suffix) for name in compare.expected if name.endswith(suffix)}:
            compare(f"{name}{suffix}", seen[name])


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
            allow_misaligned=True,
        )
    for name, value in inputs.items():
        kind, _, suffix = name.partition("_")
        suffix = f"_{suffix}" if suffix else ""
        if kind == "video" and tiling is not None:
            compare(f"moments{suffix}_tiled", model.encode_moments(value, diffusers_tiling=tiling))
            if f"moments{suffix}_untiled" in compare.expected:
                compare(f"moments{suffix}_untiled", model.encode_moments(value))
        elif kind == "video":
            moments = model.encode_moments(value)
            mean, logvar = split_moments(moments)
            for output, ours in {"moments": moments, "mode": mean, "std": (logvar / 2).exp()}.items():
                if f"{output}{suffix}" in compare.expected:
                    compare(f"{output}{suffix}", ours)
            compare(f"encode{suffix}", model.encode(value), mean * model.config.scaling_factor)
        elif kind == "latent":
            name = f"video{suffix}_tiled" if tiling is not None else f"video{suffix}"
            video = model.decode_unscaled(value, diffusers_tiling=tiling)
            compare(name, video)
            if tiling is not None and f"video{suffix}_untiled" in compare.expected:
                compare(f"video{suffix}_untiled", model.decode_unscaled(value))
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
            compare(f"sn_{count}", norm(value, inputs[f"sn_zq_{count}"], Stream()))
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
        "norm_num_groups": int(str(case.meta["norm_groups"]).split()[0]),
        "temporal_compression_ratio": original.get("temporal_compress_times", 4),
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


def table_of(config: dict[str, Any], default_shift: float = 3.0) -> Tensor:
    """The levels of a scheduler's configuration."""
    wanted = {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": "v_prediction"}
    if different := {name: config[name] for name, value in wanted.items() if config.get(name, value) != value}:
        raise AssertionError(f"scheduler: unknown settings {different}")
    shift, count = config.get("snr_shift_scale", default_shift), config.get("num_train_timesteps", 1000)
    ends = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    shifted = shift_snr(scaled_linear_alphas_cumprod(count, *ends), shift)
    return rescale_zero_terminal_snr(shifted) if config.get("rescale_betas_zero_snr") else shifted


def steps_of(config: dict[str, Any], num_steps: int) -> list[diffusion.Step]:
    table = table_of(config)
    return diffusion.diffusers_steps(
        num_steps,
        table,
        spacing=config["timestep_spacing"],
        offset=config.get("steps_offset", 0),
        final_level=1.0 if config.get("set_alpha_to_one", True) else float(table[0]),
    )


def schedule(case: Case, compare: Comparison) -> None:
    config, inputs = case.meta["config"], case.group("in/")
    for name in list(compare.expected):
        if found := re.fullmatch(r"alphas_cumprod_shift([\d.]+)", name):
            compare(name, table_of({**config, "snr_shift_scale": float(found[1])}))
        elif found := re.fullmatch(r"timesteps_(\w+)_(\d+)", name):
            offset = config.get("steps_offset", 0)
            compare(name, torch.tensor(diffusion.spaced_timesteps(int(found[2]), found[1], offset=offset)))
    stated = re.search(r"float32 others ([\d.e-]+)", case.meta["tolerance"]["dtype"])
    assert stated is not None
    # The stored noisy samples were made with the table rounded to float32 first, and without shift.
    given = [inputs["add_noise_x0"], inputs["add_noise_noise"]]
    table = table_of(config, default_shift=1.0).float()
    for name, function in (("add_noise", diffuse), ("velocity", velocity_target)):
        compare(name, function(*given, table, inputs["add_noise_t"]), atol=float(stated[1]))


def sampler(case: Case, compare: Comparison) -> None:
    inputs = case.group("in/")
    steps = steps_of(case.meta["config"], case.meta["steps"])
    compare.equal("timesteps", [step.timestep for step in steps], inputs["timesteps"].tolist())
    draws = inputs["noise_draws_used_after_step"].tolist()
    compare.equal("noise drawn", [sum(step.draws for step in steps[: i + 1]) for i in range(len(steps))], draws)
    for solver in (solver for solver in ("ddim", "dpm") if f"{solver}_samples" in compare.expected):
        x, last_clean = inputs["x_init"], None
        samples, cleans = [], []
        for step, velocity, count in zip(steps, inputs["model_outputs"], draws, strict=True):
            if solver == "ddim":
                x, last_clean = diffusion.ddim_step(x, velocity, step)
            else:
                x, last_clean = diffusion.dpm_step(x, velocity, step, inputs["noise_draws"][count - 1], last_clean)
            samples.append(x)
            cleans.append(last_clean)
        compare(f"{solver}_samples", torch.stack(samples))
        if f"{solver}_pred_x0" in compare.expected:
            compare(f"{solver}_pred_x0", torch.stack(cleans))


def dynamic_guidance(case: Case, compare: Comparison) -> None:
    scales = re.search(r"guidance (\S+) for (\d+) steps; (\S+) for the shorter", case.meta["call"])
    assert scales is not None
    for name, stored in compare.expected.items():
        count = len(stored)
        scale = float(scales[1] if count == int(scales[2]) else scales[3])
        by_index = name.startswith("dyncfg_stepindex")
        places = range(count, 0, -1) if by_index else diffusion.spaced_timesteps(count)
        values = [diffusion.dynamic_guidance_scale(scale, place, count) for place in places]
        compare(name, torch.tensor(values, dtype=torch.float64))


def train_loss(case: Case, compare: Comparison) -> None:
    inputs = case.group("in/")
    model = transformer(case.meta["config"], case.group("w/"))
    table = diffusion.cogvideox_alphas_cumprod(case.meta["snr_shift_scale"])
    latents, noise, timesteps = swap(inputs["x0"]), swap(inputs["noise"]), inputs["timestep"]
    rotary = described_rotation(case.meta["rope"], model.config.attention_head_dim) if case.meta.get("rope") else None
    options = {"ofs": inputs["ofs"]} if "ofs" in inputs else {}
    seen: dict[str, Tensor] = {}

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        seen["noised"] = x
        x = x if "image_latents" not in inputs else torch.cat([x, swap(inputs["image_latents"])], 1)
        seen["velocity"] = model(x, timestep, inputs["encoder_hidden_states"], rotary=rotary, **options)
        return seen["velocity"]

    losses = diffusion.cogvideox_losses(velocity, latents, alphas_cumprod=table, timesteps=timesteps, noise=noise)
    losses.mean().backward()
    if "alphas_cumprod_at_t" in inputs:
        compare("alphas_cumprod_at_t", table[timesteps], inputs["alphas_cumprod_at_t"])
    plain = (seen["velocity"] - velocity_target(latents, noise, table, timesteps)).square().mean()
    compare("loss", losses.mean().reshape(1))
    for name, value in {
        "noised": swap(seen["noised"]),
        "model_output_v": swap(seen["velocity"]),
        "loss_per_sample": losses,
        "loss_plain_v_mse": plain.reshape(1),
    }.items():
        if name in compare.expected:
            compare(name, value)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name in case.group("out/grad/"):
        compare(f"grad/{name}", gradients[name])


def sat_sampler(case: Case, compare: Comparison) -> None:
    inputs, count, shift = case.group("in/"), case.meta["steps"], case.meta["shift_scale"]
    stated = re.search(r"(Dynamic|Vanilla)CFG scale ([\d.]+)", case.meta["call"])
    assert stated is not None
    steps = diffusion.sat_steps(count, shift)
    context = inputs["context"]

    def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        mixed = torch.einsum("bcthw,cd->bdthw", x.tanh(), inputs["A"])
        shape = (-1, 1, 1, 1, 1)
        return mixed * (1 + timestep.float() / 1000).view(shape) + context.mean((1, 2)).view(shape)

    for name in list(compare.expected):
        if found := re.fullmatch(r"alphas_cumprod_sqrt_(\d+)", name):
            levels = [step.level for step in diffusion.sat_steps(int(found[1]), shift)]
            compare(name, torch.tensor(levels, dtype=torch.float64).sqrt())
        elif found := re.fullmatch(r"timesteps_ascending_(\d+)", name):
            compare(name, torch.tensor([step.timestep for step in reversed(diffusion.sat_steps(int(found[1]), shift))]))
    compare("c_noise_sequence", torch.tensor([float(step.timestep) for step in steps]))
    solvers = {"ddim": "ddim", "dpmpp2m_sde": "dpm"}
    for name, solver in ((name, solver) for name, solver in solvers.items() if name in compare.expected):
        draws = iter(inputs["noise_draws"])
        final = diffusion.sample_discrete(
            network,
            swap(inputs["x"]),
            steps,
            {"context": context},
            negative_conditioning={"context": torch.zeros_like(context)},
            solver=solver,
            guidance_scale=float(stated[2]),
            dynamic_guidance=stated[1] == "Dynamic",
            draw=lambda draws=draws: swap(next(draws)),  # type: ignore[misc]
        )
        compare(name, swap(final))
        if solver == "dpm":
            compare.equal("noise left over", len([*draws]), 0)


@torch.no_grad()
def image_latents(case: Case, compare: Comparison) -> None:
    model, inputs = autoencoder(case.meta["vae"], case.group("w/vae.")), case.group("in/")
    frames = compare.expected["image_latents"].shape[1]
    compare("image_latents", swap(encode_image(model, inputs["image_minus1to1"], frames, None)))


def encode_image(vae: Any, image: Tensor, frames: int, patch_size_t: int | None) -> Tensor:
    mean, _ = vae.encode_moments(image.unsqueeze(2)).chunk(2, 1)
    return diffusion.image_latents(vae.normalize_image(mean), frames, patch_size_t=patch_size_t)


@torch.no_grad()
def pipeline(case: Case, compare: Comparison) -> None:
    meta, inputs = case.meta, case.group("in/")
    model = transformer(meta["transformer"], case.group("w/transformer."))
    vae = autoencoder(meta["vae"], case.group("w/vae."))
    stated = {name: float(value) for name, value in re.findall(r"\b(frames|steps|guidance) ([\d.]+)", meta["call"])}
    if "frames" not in stated:
        found = re.search(r"(\d+) frames", meta["call"])
        assert found is not None
        stated["frames"] = float(found[1])
    stochastic, patch_size_t = "dpm_noise_draws" in inputs, model.config.patch_size_t
    frames, padding = diffusion.latent_frames(int(stated["frames"]), patch_size_t=patch_size_t)
    if "steps" in stated:
        steps = steps_of(meta["scheduler"], int(stated["steps"]))
    else:  # the draws tell
        lists = (steps_of(meta["scheduler"], count) for count in range(1, 1001))
        steps = next(found for found in lists if sum(s.draws for s in found) == len(inputs["dpm_noise_draws"]))

    text = {"encoder_hidden_states": inputs["prompt_embeds"]}
    negative = {"encoder_hidden_states": inputs["negative_prompt_embeds"]}
    if model.config.in_channels > model.config.out_channels:
        image = inputs["image_0to1"] * 2 - 1 if "image_0to1" in inputs else inputs["image_minus1to1"]
        image_latent = encode_image(vae, image, frames, patch_size_t)
        given = {
            "image_minus1to1": image,
            "image_latents": swap(image_latent),
            f"image_latents_unpadded_{int(stated['frames'])}frames": swap(
                encode_image(vae, image, frames - padding, patch_size_t)
            ),
        }
        for name in compare.expected.keys() & given.keys():
            compare(name, given[name])
        text["image"] = negative["image"] = image_latent

    def velocity(x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, image: Tensor | None = None) -> Tensor:
        return model(x if image is None else torch.cat([x, image], 1), timestep, encoder_hidden_states)

    def sampled(dynamic: bool) -> Tensor:
        draws = iter(inputs.get("dpm_noise_draws", ()))
        return diffusion.sample_discrete(
            velocity,
            swap(inputs["latents"]),
            steps,
            text,
            negative_conditioning=negative,
            solver="dpm" if stochastic else "ddim",
            guidance_scale=stated.get("guidance", 6.0),
            dynamic_guidance=dynamic,
            draw=lambda: swap(next(draws)),
        )

    for name in list(compare.expected):
        if name.startswith("latents"):
            latents = sampled(dynamic=name == "latents_dynamic_cfg")
            compare(name, swap(latents))
        elif name.startswith("video"):
            video = vae.decode(sampled(dynamic=name == "video_dynamic_cfg")[:, :, padding:])
            compare(name, video if name == "video_raw" else swap((video / 2 + 0.5).clamp(0, 1)))


RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {
    "checkpoint_convert": checkpoints.cogvideox,
    "dynamic_guidance": dynamic_guidance,
    "image_latents": image_latents,
    "pipeline": pipeline,
    "rope": rope,
    "sampler": sampler,
    "sat_sampler": sat_sampler,
    "sat_transformer_forward": sat_transformer_forward,
    "sat_vae": sat_vae,
    "schedule": schedule,
    "train_loss": train_loss,
    "transformer_forward": transformer_forward,
    "vae": vae,
    "vae_blocks": vae_blocks,
}
NOT_BUILT: set[str] = set()
