# SPDX-License-Identifier: Apache-2.0
"""Sampling of Open-Sora 2.0: schedule, guidance by text and by image, and the loop over the model.

Noise levels run from 1 (noise) to 0 (data). Source: hpcaitech/Open-Sora, commit 7ad6a96. Shapes: B batch, C channels,
T H W latent frames, height and width, L tokens of a packed latent, S text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vidgen.nn import pack_patches, patch_positions, unpack_patches

from .sampling import euler_step
from .schedules import shift_sigmas

OSCILLATION_STARTS = 10
OnStep = Callable[[int, Tensor], None]


def latent_frames(num_frames: int, *, time_ratio: int = 4, causal: bool = True) -> int:
    """Of n frames ``(n - 1) // time_ratio + 1`` with a causal autoencoder, else ``n // time_ratio``; of 1 always 1."""
    if num_frames < 1 or time_ratio < 1:
        raise ValueError(f"latent_frames: num_frames and time_ratio must be positive, got {num_frames}, {time_ratio}")
    if num_frames == 1:
        return 1
    return (num_frames - 1) // time_ratio + 1 if causal else num_frames // time_ratio


def resolution_shift(tokens_per_frame: int, frames: int, *, base_shift: float = 1.0, max_shift: float = 3.0) -> float:
    """``(base + (S - 256) (max - base) / (4096 - 256)) sqrt(T)`` for S tokens per latent frame and T latent frames."""
    if tokens_per_frame < 1 or frames < 1:
        raise ValueError(
            f"resolution_shift: tokens_per_frame and frames must be positive, got {tokens_per_frame} and {frames}"
        )
    slope = (max_shift - base_shift) / (4096 - 256)
    return (slope * tokens_per_frame + (base_shift - slope * 256)) * math.sqrt(frames)


def schedule(
    num_steps: int,
    tokens_per_frame: int,
    frames: int,
    *,
    flow_shift: float | None = None,
    shift: bool = True,
    base_shift: float = 1.0,
    max_shift: float = 3.0,
) -> Tensor:
    """``num_steps + 1`` float32 levels from 1 to 0: evenly spaced u, then ``a u / (1 + (a - 1) u)``.

    Args:
        num_steps: at least 1.
        tokens_per_frame, frames: of the packed latent; they set ``a``, see :func:`resolution_shift`.
        flow_shift: a given ``a``.
        shift: False leaves u.
        base_shift, max_shift: of :func:`resolution_shift`.

    Raises:
        ValueError: ``num_steps < 1`` or a shift that is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"schedule: num_steps must be at least 1, got {num_steps}")
    levels = torch.linspace(1, 0, num_steps + 1)
    if not shift:
        return levels
    if flow_shift is None:
        flow_shift = resolution_shift(tokens_per_frame, frames, base_shift=base_shift, max_shift=max_shift)
    return shift_sigmas(levels, flow_shift)


def initial_noise(
    batch: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    *,
    patch_size: int = 2,
    spatial_compression: int = 16,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal latent ``(B, C, T, p ceil(height / 16), p ceil(width / 16))`` from a generator of its own.

    Args:
        frames: of the latent.
        height, width: of the video; rounded up to whole patches.
        spatial_compression: pixels along a side of a patch: 16 (autoencoder 8, patch 2), 32 for the 4x32x32 one.
        seed, dtype, device: the original draws on the model's device in the model's dtype.
    """
    sides = (patch_size * math.ceil(side / spatial_compression) for side in (height, width))
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(batch, channels, frames, *sides, generator=generator, dtype=dtype, device=device)


def oscillate(scale: float, step: int, *, force_num: int = OSCILLATION_STARTS) -> float:
    """The scale itself in the first ``force_num`` steps and in even ones, else 1."""
    return scale if step < force_num or step % 2 == 0 else 1.0


def guide_text_and_image(
    text_and_image: Tensor, image: Tensor, neither: Tensor, text_scale: float, image_scale: float | Tensor
) -> Tensor:
    """``neither + image_scale (image - neither) + text_scale (text_and_image - image)``, computed in float32.

    Args:
        text_and_image, image, neither: predictions ``(B, ...)`` with text and condition, without text, without both.
        text_scale: strength of the text.
        image_scale: strength of the condition, a number or a tensor that broadcasts (one value for each token).
    """
    c, u, w = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (text_and_image, image, neither))
    return (w + image_scale * (u - w) + text_scale * (c - u)).to(text_and_image.dtype)


def frame_ramp(image_scale: float, step: int, num_steps: int, frames: int, tokens_per_frame: int) -> Tensor:
    """Image scale of each token, ``(1, L, 1)``: from 1 in the first frame to the step's maximum in the last.

    The maximum falls from ``image_scale`` towards 1 over the steps: frames far from a given first frame need the
    condition most, and early steps more than late ones.
    """
    highest = torch.linspace(image_scale, 1.0, num_steps + 1)[step]
    return torch.linspace(1.0, float(highest), frames).repeat_interleave(tokens_per_frame).view(1, -1, 1)


@torch.no_grad()
def sample_guided(
    model: Callable[..., Tensor],
    noise: Tensor,
    levels: Tensor,
    conditioning: Mapping[str, Tensor],
    negative_conditioning: Mapping[str, Tensor],
    *,
    mask: Tensor | None = None,
    masked_latent: Tensor | None = None,
    guidance: float = 7.5,
    guidance_img: float = 3.0,
    text_osci: bool = True,
    image_osci: bool = True,
    scale_temporal_osci: bool = True,
    patch_size: int = 2,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler steps with guidance by text and by a condition (method ``i2v`` of the original, text to video included).

    Each step asks the model for three predictions: with text and condition, without text, without both. Without a
    condition the last two are the same and only two are made.

    Args:
        model: ``MMDiT``, or what takes its keyword arguments.
        noise: ``(B, C, T, H, W)``; latents keep its dtype.
        levels: from :func:`schedule`.
        conditioning: ``txt`` ``(B, S, text channels)`` and ``y_vec`` ``(B, pooled channels)``.
        negative_conditioning: the same for the negative prompt, by default the empty one.
        mask, masked_latent: ``(B, 1, T, H, W)`` and ``(B, C, T, H, W)`` from ``inference_condition``; zeros for text to
            video, None for a model without ``cond_embed``.
        guidance: scale of the text.
        guidance_img: scale of the condition.
        text_osci, image_osci: let a scale oscillate, see :func:`oscillate`.
        scale_temporal_osci: let the condition's scale grow over the frames, see :func:`frame_ramp`. The original does
            so for ``i2v_*`` conditions only: pass False for ``v2v_*``.
        patch_size: of the model.
        on_step: called after each step as ``on_step(index, latents)`` with packed latents ``(B, L, C p p)``.

    Returns:
        Latents ``(B, C, T, H, W)`` at ``levels[-1]``.

    Raises:
        ValueError: arguments do not fit.
        FloatingPointError: a prediction is not finite; the message names the step.
    """
    grid, batch = check_noise("sample_guided", noise, patch_size), noise.shape[0]
    steps = check_levels("sample_guided", levels)
    check_condition(noise, mask, masked_latent)
    conditioned = mask is not None and bool(mask.any())
    branches = 3 if conditioned else 2
    negatives = [negative_conditioning] * (branches - 1)
    arguments = text_arguments(noise, conditioning, *negatives) | positions(grid, conditioning["txt"].shape[1], noise)
    if mask is not None and masked_latent is not None:
        cond = pack_patches(torch.cat((mask, masked_latent), 1).to(noise.dtype), patch_size)
        arguments["cond"] = torch.cat((cond, cond, torch.zeros_like(cond))[:branches])
    arguments["guidance"] = noise.new_full((branches * batch,), guidance)

    latents, num_steps = pack_patches(noise, patch_size), len(steps) - 1
    for index, (level, next_level) in enumerate(zip(steps, steps[1:], strict=False)):
        predictions = model(
            img=latents.repeat(branches, 1, 1),
            timesteps=latents.new_full((branches * batch,), level),  # rounded to the latents' dtype, as in training
            **arguments,
        ).chunk(branches)
        text_scale = oscillate(guidance, index) if text_osci else guidance
        image_scale: float | Tensor = oscillate(guidance_img, index) if image_osci else guidance_img
        if scale_temporal_osci and image_scale > 1:
            ramp = frame_ramp(float(image_scale), index, num_steps, grid[0], grid[1] * grid[2])
            image_scale = ramp.to(noise.device)
        velocity = guide_text_and_image(predictions[0], predictions[1], predictions[-1], text_scale, image_scale)
        latents = step_to(latents, velocity, level, next_level, index, num_steps)
        if on_step is not None:
            on_step(index, latents)
    return unpack_patches(latents, grid, patch_size)


@torch.no_grad()
def sample_distilled(
    model: Callable[..., Tensor],
    noise: Tensor,
    levels: Tensor,
    conditioning: Mapping[str, Tensor],
    *,
    guidance: float = 4.0,
    patch_size: int = 2,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler steps of a guidance-distilled model (method ``distill``): one prediction, the scale is an input.

    Args:
        model: ``MMDiT`` with ``guidance_embed``, without ``cond_embed``.
        noise, levels, conditioning, patch_size, on_step: as in :func:`sample_guided`.
        guidance: scale that the model embeds.

    Returns:
        Latents ``(B, C, T, H, W)`` at ``levels[-1]``.

    Raises:
        ValueError: arguments do not fit.
        FloatingPointError: a prediction is not finite; the message names the step.
    """
    grid, steps = check_noise("sample_distilled", noise, patch_size), check_levels("sample_distilled", levels)
    arguments = text_arguments(noise, conditioning) | positions(grid, conditioning["txt"].shape[1], noise)
    arguments["guidance"] = noise.new_full((noise.shape[0],), guidance)
    latents, num_steps = pack_patches(noise, patch_size), len(steps) - 1
    for index, (level, next_level) in enumerate(zip(steps, steps[1:], strict=False)):
        velocity = model(img=latents, timesteps=latents.new_full((noise.shape[0],), level), **arguments)
        latents = step_to(latents, velocity, level, next_level, index, num_steps)
        if on_step is not None:
            on_step(index, latents)
    return unpack_patches(latents, grid, patch_size)


def positions(grid: tuple[int, int, int], num_text: int, like: Tensor) -> dict[str, Tensor]:
    """``img_ids`` and ``txt_ids`` for the whole batch; text has position 0."""
    ids = patch_positions(grid, device=like.device)
    return {"img_ids": ids, "txt_ids": ids.new_zeros(num_text, 3)}


def text_arguments(noise: Tensor, *branches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``txt`` and ``y_vec`` of all branches, one after the other along the batch, in the dtype of the noise."""
    for branch in branches:
        if branch.keys() != {"txt", "y_vec"}:
            raise ValueError(f"sample: conditioning must have txt and y_vec, got {', '.join(sorted(branch)) or 'none'}")
        for name, value in branch.items():
            wanted = (noise.shape[0], *branches[0][name].shape[1:])
            if tuple(value.shape) != wanted:
                raise ValueError(f"sample: {name} must be {wanted} in every conditioning, got {tuple(value.shape)}")
    return {name: torch.cat([branch[name].to(noise.dtype) for branch in branches]) for name in ("txt", "y_vec")}


def step_to(latents: Tensor, velocity: Tensor, level: float, next_level: float, index: int, num_steps: int) -> Tensor:
    """One Euler step of packed latents, which keep their dtype."""
    if velocity.shape != latents.shape:
        raise ValueError(f"sample: model must return {tuple(latents.shape)}, got {tuple(velocity.shape)}")
    if not torch.isfinite(velocity).all():
        raise FloatingPointError(
            f"sample: velocity is not finite at step {index} of {num_steps}, noise level {level:.6g}"
        )
    return euler_step(latents, velocity, level, next_level).to(latents.dtype)


def check_noise(where: str, noise: Tensor, patch_size: int) -> tuple[int, int, int]:
    """The grid of tokens."""
    if noise.dim() != 5 or 0 in noise.shape or any(side % patch_size for side in noise.shape[3:]):
        wanted = f"(batch, channels, frames, height, width) with sides that are multiples of {patch_size}"
        raise ValueError(f"{where}: noise must be {wanted}, got {tuple(noise.shape)}")
    return noise.shape[2], noise.shape[3] // patch_size, noise.shape[4] // patch_size


def check_levels(where: str, levels: Tensor) -> list[float]:
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(f"{where}: levels must be (num_steps + 1,) with num_steps >= 1, got {tuple(levels.shape)}")
    return [float(level) for level in levels]


def check_condition(noise: Tensor, mask: Tensor | None, masked_latent: Tensor | None) -> None:
    if (mask is None) != (masked_latent is None):
        raise ValueError("sample_guided: mask and masked_latent go together, got only one of them")
    wanted = {"mask": (mask, (noise.shape[0], 1, *noise.shape[2:])), "masked_latent": (masked_latent, noise.shape)}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"sample_guided: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
