# SPDX-License-Identifier: Apache-2.0
"""From a clip's frames to a model's video: which frames, which part of the picture, which size. Pure functions.

The rules are those of Open-Sora Plan 1.5's video pipeline.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.data.video import VideoError


def frame_indices(
    num_frames: int,
    fps: float,
    train_fps: float | None,
    count: int,
    *,
    start: int = 0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Numbers of the ``count`` frames of a clip that are ``1 / train_fps`` seconds apart.

    ``interval = fps / train_fps`` (1 where the two differ by less than 0.1, or where ``train_fps`` is None), candidates
    ``floor(start + k * interval)`` below ``start + num_frames``, of which ``count`` neighbours are taken: from a place
    drawn uniformly with ``generator``, or the first ones without it. (The original never draws the very last place.)

    Args:
        num_frames: frames of the clip, or of its cut, counted from ``start``.
        fps, train_fps: frames per second of the clip and wanted.

    Raises:
        VideoError: the clip has fewer frames per second than wanted (frames are never repeated), or is too short.
    """
    if count < 1 or start < 0:
        raise ValueError(f"frame_indices: count must be positive and start not negative, got {count} and {start}")
    if not all(math.isfinite(rate) and rate > 0 for rate in (fps, train_fps or fps)):
        raise ValueError(f"frame_indices: fps and train_fps must be positive, got {fps} and {train_fps}")
    interval = 1.0 if train_fps is None or abs(fps - train_fps) < 0.1 else fps / train_fps
    if interval < 1:
        raise VideoError(f"{fps:g} frames per second, {train_fps:g} wanted")
    available = math.ceil(num_frames / interval)
    if available < count:
        raise VideoError(f"too short: {available} frames at the wanted rate, {count} wanted")
    first = 0
    if generator is not None:
        first = int(torch.randint(available - count + 1, (), generator=generator))
    return [int(start + k * interval) for k in range(first, first + count)]


def center_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """The largest centred part of ``(..., height, width, 3)`` frames that has the aspect ratio ``height / width``."""
    ratio = height / width
    full_height, full_width = frames.shape[-3:-1]
    if full_height / full_width > ratio:
        new_height, new_width = max(1, int(full_width * ratio)), full_width
    else:
        new_height, new_width = full_height, max(1, int(full_height / ratio))
    top, left = round((full_height - new_height) / 2), round((full_width - new_width) / 2)
    return frames[..., top : top + new_height, left : left + new_width, :]


def resize_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Centre-crop to the aspect ratio, resize, scale: what a model is fed.

    ``2 * bicubic(crop(frames) / 255) - 1``, with antialiasing and aligned corners, clamped to [-1, 1], which bicubic
    interpolation overshoots a little at edges.

    Args:
        frames: uint8 ``(frames, height, width, 3)``.

    Returns float32 ``(3, frames, height, width)``.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
        raise ValueError(
            f"resize_crop: frames must be uint8 (frames, height, width, 3), got {frames.dtype} {tuple(frames.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"resize_crop: height and width must be positive, got {height} and {width}")
    video = torch.empty(3, len(frames), height, width)
    for number, frame in enumerate(center_crop(frames, height, width)):  # one by one: a whole clip in float is large
        picture = frame.permute(2, 0, 1).unsqueeze(0).float() / 255
        if picture.shape[2:] != (height, width):
            picture = F.interpolate(picture, (height, width), mode="bicubic", align_corners=True, antialias=True)
        video[:, number] = (picture[0] * 2 - 1).clamp(-1, 1)
    return video


def to_frames(video: Tensor) -> Tensor:
    """A model's video ``(3, frames, height, width)`` in [-1, 1] as uint8 frames ``(frames, height, width, 3)``.

    Values outside the range are clamped; NaN raises ValueError.
    """
    if video.ndim != 4 or video.shape[0] != 3 or not video.is_floating_point():
        raise ValueError(
            f"to_frames: video must be floating point (3, frames, height, width), "
            f"got {video.dtype} {tuple(video.shape)}"
        )
    video = video.detach().float()
    if video.isnan().any():
        raise ValueError("to_frames: the video has NaN in it")
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def crop_box(frames: Tensor, box: Sequence[int]) -> Tensor:
    """The part ``(x0, x1, y0, y1)``, in pixels, of ``(frames, height, width, 3)`` frames."""
    x0, x1, y0, y1 = box
    height, width = frames.shape[1:3]
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise VideoError(f"crop {tuple(box)} does not lie inside a picture of {height} x {width}")
    return frames[:, y0:y1, x0:x1]
