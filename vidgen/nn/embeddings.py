# SPDX-License-Identifier: Apache-2.0
"""Embeddings of timesteps, pooled text and patches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """``[cos(t f_i), sin(t f_i)]`` with ``f_i = 10000 ** (-i / (dim / 2))``, in float32 (float64 stays float64).

    Args:
        timestep: ``(batch)``; integers or floating point.
        dim: even.

    Returns:
        ``(batch, dim)``, cosines first.
    """
    if timestep.dim() != 1 or dim % 2:
        raise ValueError(
            f"sinusoidal_embedding: timestep must be (batch) and dim even, got {tuple(timestep.shape)}, {dim}"
        )
    half = dim // 2
    wide = torch.promote_types(timestep.dtype, torch.float32)
    # In float32, in the originals' order: the last bit of a frequency is 6e-5 of an angle of 1000.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=wide, device=timestep.device) / half)
    angles = timestep.to(wide)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class EmbeddingMLP(nn.Module):
    """``linear_2(silu(linear_1(x)))``: ``(batch, in_dim)`` to ``(batch, dim)``."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimestepTextEmbedding(nn.Module):
    """Sum of an embedded timestep ``(batch)`` and an embedded pooled text ``(batch, pooled_dim)``: ``(batch, dim)``."""

    def __init__(self, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(dim, dim)
        self.text_embedder = EmbeddingMLP(pooled_dim, dim)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        weight = self.timestep_embedder.linear_1.weight
        sinusoid = sinusoidal_embedding(timestep, weight.shape[1])
        return self.timestep_embedder(sinusoid.to(weight.dtype)) + self.text_embedder(pooled.to(weight.dtype))


class FramePatchEmbed(nn.Module):
    """Patches of each frame by themselves: ``(batch, channels, frames, height, width)`` to ``(batch, tokens, dim)``.

    Tokens run over frames, then rows, then columns.
    """

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        frames = x.to(self.proj.weight.dtype).transpose(1, 2).flatten(0, 1)
        return self.proj(frames).flatten(2).transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Tokens back to a video.

    Args:
        tokens: ``(batch, tokens, patch volume * channels)``; within a token the order is frame, row, column, channel.
        grid: number of tokens along frames, height and width.
        patch: size of a patch along the same axes.

    Returns:
        ``(batch, channels, frames, height, width)``, contiguous.
    """
    batch = tokens.shape[0]
    x = tokens.reshape(batch, *grid, *patch, -1)  # batch, T, H, W, t, h, w, channels
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, -1, *(g * p for g, p in zip(grid, patch, strict=True)))
