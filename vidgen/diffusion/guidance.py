# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance (arXiv 2207.12598) and its rescaling (arXiv 2305.08891, section 3.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """``negative + scale * (positive - negative)``, then ``rescale_guidance`` if ``rescale > 0``.

    Args:
        negative, positive: ``(batch, ...)`` predictions under the negative and the positive conditioning.
        scale: guidance strength g; 1 returns the positive prediction up to rounding.
        rescale: r in [0, 1].

    Raises:
        ValueError: shapes differ or ``rescale`` lies outside [0, 1].
    """
    if negative.shape != positive.shape:
        raise ValueError(f"guide: negative must be {tuple(positive.shape)} like positive, got {tuple(negative.shape)}")
    guided = negative + scale * (positive - negative)
    return rescale_guidance(guided, positive, rescale) if rescale != 0 else guided


def rescale_guidance(guided: Tensor, positive: Tensor, rescale: float) -> Tensor:
    """``r * guided * std(positive) / std(guided) + (1 - r) * guided``.

    Strong guidance inflates the spread of the prediction and overexposes the video; this pulls it back towards the
    spread of the positive prediction. The standard deviation is the unbiased one, per sample over all other axes.

    Args:
        guided, positive: ``(batch, ...)`` of the same shape.
        rescale: r in [0, 1]; Open-Sora Plan v1.5 uses 0.7.

    Raises:
        ValueError: ``rescale`` outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale_guidance: rescale must lie in [0, 1], got {rescale}")
    axes = tuple(range(1, guided.dim()))
    spread = torch.std(positive, dim=axes, keepdim=True) / torch.std(guided, dim=axes, keepdim=True)
    return rescale * (guided * spread) + (1 - rescale) * guided


def dynamic_guidance_scale(scale: float, timestep: int, num_steps: int, *, exponent: float = 5.0) -> float:
    """``1 + scale * (1 - cos(pi * ((num_steps - timestep) / num_steps) ** exponent)) / 2``, in float64 (CogVideoX).

    The originals put the timestep of 0..999 where the formula means the index of the step, so that the value jumps
    about between 1 and ``1 + scale`` instead of rising; the models are used that way, and so it is here.

    Raises:
        ValueError: ``num_steps`` is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"dynamic_guidance_scale: num_steps must be at least 1, got {num_steps}")
    return 1 + scale * (1 - math.cos(math.pi * ((num_steps - timestep) / num_steps) ** exponent)) / 2
