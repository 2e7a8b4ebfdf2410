# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video are given and which are generated, and how a model is told (Open-Sora Plan v1.3, i2v).

Masks are 1 where a frame is to be generated and 0 where it is given. Behind its noisy latent the model sees the latent
of the video with generated frames blackened, and the mask at the latent's size, with one channel for each frame that a
latent frame stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_TYPES = ("t2iv", "i2v", "transition", "continuation", "clear", "random_temporal")
# What the original trains on: how often each kind comes, relative to the others.
VIDEO_MASK_RATIOS = {"t2iv": 1, "i2v": 8, "transition": 8, "continuation": 2, "clear": 0, "random_temporal": 1}
IMAGE_MASK_RATIOS = {"t2iv": 1, "clear": 1}
BLACK = -1.0


def frame_mask(
    kind: str,
    num_frames: int,
    *,
    min_clear_ratio: float = 0.0,
    max_clear_ratio: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(num_frames,)`` float32, 1 = generate, 0 = given.

    Args:
        kind: ``"t2iv"`` gives no frame, ``"i2v"`` the first, ``"transition"`` the first and the last, ``"clear"`` all,
            ``"continuation"`` the first n and ``"random_temporal"`` any n.
        min_clear_ratio, max_clear_ratio: n is drawn from ``floor(num_frames * min)`` to ``ceil(num_frames * max)``.
        generator: of the draws.

    Raises:
        ValueError: an unknown kind, no frames, or ratios that are not ``0 <= min <= max <= 1``.
    """
    if num_frames < 1:
        raise ValueError(f"frame_mask: num_frames must be at least 1, got {num_frames}")
    if not 0 <= min_clear_ratio <= max_clear_ratio <= 1:
        ratios = f"{min_clear_ratio} and {max_clear_ratio}"
        raise ValueError(f"frame_mask: ratios must be 0 <= min_clear_ratio <= max_clear_ratio <= 1, got {ratios}")
    mask = torch.ones(num_frames)
    if kind == "i2v":
        mask[0] = 0
    elif kind == "transition":
        mask[[0, -1]] = 0
    elif kind == "clear":
        mask[:] = 0
    elif kind in ("continuation", "random_temporal"):
        least, most = math.floor(num_frames * min_clear_ratio), math.ceil(num_frames * max_clear_ratio)
        count = int(torch.randint(least, most + 1, (), generator=generator))
        chosen = torch.arange(count)
        if kind == "random_temporal":
            chosen = torch.randperm(num_frames, generator=generator)[:count]
        mask[chosen] = 0
    elif kind != "t2iv":
        raise ValueError(f"frame_mask: kind must be one of {', '.join(MASK_TYPES)}, got {kind!r}")
    return mask


def draw_mask_type(ratios: Mapping[str, float], generator: torch.Generator | None = None) -> str:
    """One of the kinds of :func:`frame_mask`, as often as the ratios say; all equally often where all are 0.

    Raises:
        ValueError: no kinds, unknown ones, or negative ratios.
    """
    unknown = [name for name in ratios if name not in MASK_TYPES]
    if not ratios or unknown or any(not ratio >= 0 for ratio in ratios.values()):
        wanted = f"not negative, for some of {', '.join(MASK_TYPES)}"
        raise ValueError(f"draw_mask_type: ratios must be {wanted}, got {dict(ratios)}")
    weights = torch.tensor(list(ratios.values()), dtype=torch.float64)
    weights = weights if weights.any() else torch.ones_like(weights)
    return list(ratios)[int(torch.multinomial(weights, 1, generator=generator))]


def place_frames(frames: Tensor, indices: Sequence[int], num_frames: int) -> tuple[Tensor, Tensor]:
    """A video that holds the given frames and is black elsewhere, and its mask.

    Args:
        frames: ``(channels, n, height, width)`` in [-1, 1].
        indices: where they belong, one for each; negative ones count from the end. ``(0,)`` is image to video,
            ``(0, -1)`` a transition, ``range(n)`` a continuation.
        num_frames: of the video.

    Returns:
        ``(channels, num_frames, height, width)`` and ``(num_frames,)``, 0 where a frame is given.

    Raises:
        ValueError: indices that do not fit the frames or the video, or that repeat.
    """
    places = [index + num_frames if index < 0 else index for index in indices]
    fits = frames.dim() == 4 and len(places) == frames.shape[1] > 0 and len(set(places)) == len(places)
    if not fits or not all(0 <= place < num_frames for place in places):
        wanted = f"one place within {num_frames} frames for each of (channels, n, height, width) frames"
        raise ValueError(f"place_frames: indices must be {wanted}, got {list(indices)} for {tuple(frames.shape)}")
    video = frames.new_full((frames.shape[0], num_frames, *frames.shape[2:]), BLACK)
    video[:, places] = frames
    mask = torch.ones(num_frames, device=frames.device)
    mask[places] = 0
    return video, mask


def hide_generated(video: Tensor, mask: Tensor, hidden: float = BLACK) -> Tensor:
    """``video`` where ``mask < 0.5`` and ``hidden`` elsewhere; the mask broadcasts to ``(..., height, width)``.

    The original multiplies pixels of 0 to 255 by 0 and normalises afterwards, which is -1 for pixels of -1 to 1.
    """
    return torch.where(mask < 0.5, video, torch.full_like(video, hidden))


def condition_noise_levels(
    batch: int,
    *,
    log_mean: float = -3.0,
    log_std: float = 0.5,
    skip_probability: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(batch,)`` standard deviations of :func:`add_condition_noise`: ``exp(N(log_mean, log_std))``, now and then 0.

    The defaults are the original's in training; it samples with the log of a strength, 0.01 and 0.
    """
    levels = (log_mean + log_std * torch.randn(batch, generator=generator)).exp()
    return levels * (torch.rand(batch, generator=generator) >= skip_probability)


def add_condition_noise(video: Tensor, mask: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """``video + level * noise`` in given frames, so that the model does not copy their flaws.

    Args:
        video, noise: ``(batch, channels, frames, height, width)``.
        mask: broadcasts to the video; given is below 0.5.
        levels: ``(batch,)``.
    """
    return torch.where(mask < 0.5, video + levels.to(video).view(-1, 1, 1, 1, 1) * noise, video)


def compress_mask(mask: Tensor, *, frames_per_latent: int = 4, pixels_per_latent: int = 8) -> Tensor:
    """A video's mask at the size of its latent: one channel for each frame that a latent frame stands for.

    Frames are resized bilinearly. Channel c of latent frame t > 0 holds frame ``1 + frames_per_latent * (t - 1) + c``;
    latent frame 0 holds frame 0 in all channels. A number of frames that is a multiple of ``frames_per_latent`` is
    grouped as it is.

    Args:
        mask: ``(batch, 1, frames, height, width)``; height and width multiples of ``pixels_per_latent``.

    Returns:
        ``(batch, frames_per_latent, latent frames, height / pixels_per_latent, width / pixels_per_latent)``.

    Raises:
        ValueError: sizes that do not fit.
    """
    factor, side = frames_per_latent, pixels_per_latent
    good = mask.dim() == 5 and mask.shape[1] == 1 and not any(size % side for size in mask.shape[3:])
    frames = mask.shape[2] if good else 0
    if not good or frames % factor not in (0, 1 % factor) or 0 in mask.shape:
        wanted = f"(batch, 1, {factor}n + 1 or {factor}n frames, height, width), height and width multiples of {side}"
        raise ValueError(f"compress_mask: mask must be {wanted}, got {tuple(mask.shape)}")
    size = tuple(length // side for length in mask.shape[3:])
    small = F.interpolate(mask.flatten(0, 2).unsqueeze(1).float(), size=size, mode="bilinear", align_corners=False)
    small = small.view(mask.shape[0], frames, *size)
    if frames % factor:
        small = torch.cat((small[:, :1].expand(-1, factor - 1, -1, -1), small), 1)
    return small.unflatten(1, (-1, factor)).transpose(1, 2).to(mask.dtype)
