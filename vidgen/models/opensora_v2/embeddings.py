# SPDX-License-Identifier: Apache-2.0
"""What MMDiT makes of positions, timesteps and pooled text."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MMDiTConfig


class Rope(NamedTuple):
    """Tables ``(S + L, D / 2)`` or ``(B, S + L, D / 2)``, text first, and which channels are a pair."""

    cos: Tensor
    sin: Tensor
    style: str

    def part(self, start: int, stop: int | None) -> Rope:
        """The tables of some tokens."""
        return Rope(self.cos[..., start:stop, :], self.sin[..., start:stop, :], self.style)


def rope_table(positions: Tensor, config: MMDiTConfig) -> Rope:
    """Angles ``position * theta ** (-2 i / d)`` of the axes, side by side.

    Args:
        positions: frame, row and column of each token, ``(tokens, 3)`` or ``(B, tokens, 3)``.
        config: the axes, and the precision: the interleaved form is computed in float64, as the original does.
    """
    wide = torch.float32 if config.use_liger_rope else torch.float64
    angles = []
    for axis, d in enumerate(config.axes_dim):
        exponents = torch.arange(0, d, 2, dtype=wide, device=positions.device) / max(d, 1)
        angles.append(positions[..., axis, None].to(wide) * (1.0 / config.theta**exponents))
    joined = torch.cat(angles, -1)
    return Rope(joined.cos().float(), joined.sin().float(), "half" if config.use_liger_rope else "interleaved")


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0, time_factor: float = 1000.0) -> Tensor:
    """``[cos(1000 t f_k), sin(1000 t f_k)]`` with ``f_k = 10000 ** (-k / (dim // 2))``: ``(B)`` to ``(B, dim)``.

    ``1000 t`` is rounded to the dtype of ``t``, which is what the released weights were trained with; angles are
    float32 (float64 stays float64), and the result has the dtype of ``t``. An odd ``dim`` ends with a zero.
    """
    half, wide = dim // 2, torch.promote_types(t.dtype, torch.float32)
    # In float32, in the original's order: the last bit of a frequency is 2e-4 of an angle of 4000.
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=wide, device=t.device) / half)
    angles = (time_factor * t)[:, None].to(wide) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], -1), (0, dim % 2)).to(t.dtype)


class MLPEmbedder(nn.Module):
    """``out_layer(silu(in_layer(x)))``: ``(B, in_dim)`` to ``(B, dim)``."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))
