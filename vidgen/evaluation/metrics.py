# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM between videos, through torchmetrics.

Videos are floating point ``(channels, frames, height, width)`` or ``(batch, channels, frames, height, width)``. The
default range is a model's, [-1, 1]; both measures clamp to it first, as a written file would. Everything is computed
in float32. The result has one value for each video: shape ``()`` or ``(batch,)``.
"""

from typing import Any

import torch
from torch import Tensor


def psnr(video: Tensor, reference: Tensor, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB: ``10 log10((high - low)^2 / mean((video - reference)^2))``.

    The mean is over all channels, frames and pixels of a video; equal videos give infinity.

    Args:
        low, high: darkest and brightest value.
    """
    image = _image_metrics()
    video, reference = _prepare("psnr", video, reference, low, high)
    values = image.peak_signal_noise_ratio(
        _batched(video), _batched(reference), data_range=high - low, reduction="none", dim=(1, 2, 3, 4)
    )
    return values if video.ndim == 5 else values[0]


def ssim(video: Tensor, reference: Tensor, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Structural similarity (Wang et al. 2004), in [-1, 1]: each frame's, averaged over the frames of a video.

    Gaussian window of 11 x 11 with sigma 1.5, k1 = 0.01, k2 = 0.03, per channel. Frames must be at least 11 x 11.
    """
    image = _image_metrics()
    video, reference = _prepare("ssim", video, reference, low, high)
    if min(video.shape[-2:]) < 11:
        raise ValueError(f"ssim: frames must be at least 11 x 11, got {video.shape[-2]} x {video.shape[-1]}")
    values = torch.stack(
        [
            image.structural_similarity_index_measure(
                first.transpose(0, 1), second.transpose(0, 1), data_range=high - low, reduction="none"
            ).mean()
            for first, second in zip(_batched(video), _batched(reference), strict=True)
        ]
    )
    return values if video.ndim == 5 else values[0]


def _image_metrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise ImportError("PSNR and SSIM need torchmetrics: pip install 'vidgen[eval]'") from error
    return image


def _prepare(name: str, video: Tensor, reference: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    if video.shape != reference.shape:
        raise ValueError(
            f"{name}: reference must have the video's shape {tuple(video.shape)}, got {tuple(reference.shape)}"
        )
    if video.ndim not in (4, 5) or 0 in video.shape:
        raise ValueError(
            f"{name}: video must be (channels, frames, height, width) or (batch, channels, frames, height, width), "
            f"got {tuple(video.shape)}"
        )
    for argument, tensor in (("video", video), ("reference", reference)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {argument} must be floating point, got {tensor.dtype}")
        if tensor.isnan().any():
            raise ValueError(f"{name}: {argument} has NaN in it")
    if not low < high:
        raise ValueError(f"{name}: low must be below high, got {low} and {high}")
    return video.detach().float().clamp(low, high), reference.detach().float().clamp(low, high)


def _batched(video: Tensor) -> Tensor:
    return video if video.ndim == 5 else video.unsqueeze(0)
