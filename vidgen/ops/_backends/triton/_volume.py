# SPDX-License-Identifier: Apache-2.0
"""Tiles of (channels, positions) of a (batch, channels, *spatial) tensor, in either memory format.

One kernel serves both formats: the strides of channels and of positions are arguments, and one of them is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._norm_silu import empty_like, like_format
from ._launch import blocks, power_of_2, stages
from ._tuning import TUNING

CHUNKS = 1024  # at most, of a sample: programs that leave a partial result, which another kernel has to read


@triton.jit
def silu_gradient(grad, affine):
    """Through ``silu``: d silu(z) / dz = s + z s (1 - s) with s = sigmoid(z)."""
    s = 1.0 / (1.0 + tl.exp(-affine))
    return grad * s * (1.0 + affine * (1.0 - s))


@dataclass(frozen=True)
class Volume:
    """``x`` as (batch, channels, positions), its strides, and the tile it is cut into."""

    x: Tensor
    batch: int
    channels: int
    positions: int
    channel_stride: int
    position_stride: int
    channels_block: int
    positions_block: int

    @property
    def warps(self) -> int:
        return TUNING[self.x.device.type].warps(self.channels_block * self.positions_block)

    @property
    def steps(self) -> int:
        """Tiles that a program which leaves a partial result goes through."""
        return max(4, blocks(blocks(self.positions, self.positions_block), CHUNKS))

    @property
    def stages(self) -> int:
        return stages(self.x, 2 * self.channels_block * self.positions_block)

    @property
    def chunks(self) -> int:
        return blocks(self.positions, self.positions_block * self.steps)

    def like(self) -> Tensor:
        return empty_like(self.x)

    def alike(self, t: Tensor) -> Tensor:
        """``t`` in the memory format of ``x``."""
        return like_format(t, self.x)


def volume(x: Tensor, *, whole_channels: bool) -> Volume:
    """``whole_channels``: a tile holds all channels of its positions."""
    x = like_format(x, x)
    last = not x.is_contiguous()
    batch, channels = x.shape[:2]
    positions = x[0, 0].numel()
    elements = TUNING[x.device.type].volume_tile
    if whole_channels:
        channels_block = power_of_2(channels)
        least = 1 if last or x.device.type == "cpu" else 64  # positions side by side: whole cache lines
        positions_block = min(power_of_2(positions), max(least, elements // channels_block))
    elif last:
        channels_block = min(power_of_2(channels), elements)
        positions_block = min(power_of_2(positions), max(1, elements // channels_block))
    else:
        positions_block = min(power_of_2(positions), elements)
        channels_block = min(power_of_2(channels), max(1, elements // positions_block))
    strides = (1, channels) if last else (positions, 1)
    return Volume(x, batch, channels, positions, *strides, channels_block, positions_block)


def statistics(v: Volume, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=v.x.device)
