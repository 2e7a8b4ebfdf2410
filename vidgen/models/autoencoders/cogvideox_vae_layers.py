# SPDX-License-Identifier: Apache-2.0
"""Layers of the CogVideoX VAE. Each takes a chunk ``(batch, channels, frames, height, width)`` and its Stream.

Unlike the streams of the WFVAE, chunks change the result: a GroupNorm sees only its chunk, and the first frame of a
chunk is treated as a still where the chunk has an odd number of frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops

from .layers import CausalConv3d, FrameConv
from .streaming import Stream

FIXED_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """GroupNorm and SiLU in one pass. It takes a latent for the decoder's sake and does not use it."""

    def silu(self, x: Tensor, z: Tensor | None, stream: Stream) -> Tensor:
        return stream.group_norm(self, x, silu=True)


class SpatialNorm(nn.Module):
    """``group_norm(x) * conv_y(z) + conv_b(z)`` with the latent z enlarged to x (arXiv 2209.09002).

    Both convolutions are of one position, and so they come before the enlargement instead of after it: the same values
    for a fraction of the work.
    """

    def __init__(self, channels: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=FIXED_EPS)
        self.conv_y = CausalConv3d(latent_channels, channels, 1)
        self.conv_b = CausalConv3d(latent_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor, stream: Stream) -> Tensor:
        y = stream.group_norm(self.norm_layer, x, silu=False)
        factor, offset = (
            ops.causal_conv3d(z, layer.conv.weight, layer.conv.bias) for layer in (self.conv_y, self.conv_b)
        )
        if torch.is_grad_enabled():
            return torch.addcmul(enlarge(offset, x), y, enlarge(factor, x))
        return y.mul_(enlarge(factor, x)).add_(enlarge(offset, x))

    def silu(self, x: Tensor, z: Tensor | None, stream: Stream) -> Tensor:
        assert z is not None  # the decoder always has one
        return F.silu(self(x, z, stream), inplace=not torch.is_grad_enabled())


def enlarge(z: Tensor, like: Tensor) -> Tensor:
    """``z`` with the frames, height and width of ``like``, each position a copy of the nearest.

    Of an odd number of frames above one, the first comes from z's first alone and the others from z's others.
    """
    frames, size = like.shape[2], like.shape[3:]
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(z, (frames, *size))
    return torch.cat([F.interpolate(z[:, :, :1], (1, *size)), F.interpolate(z[:, :, 1:], (frames - 1, *size))], 2)


class ResnetBlock(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``; the norms of the decoder see the latent."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, latent_channels: int | None = None
    ) -> None:
        super().__init__()

        def norm(channels: int) -> GroupNorm | SpatialNorm:
            if latent_channels is None:
                return GroupNorm(groups, channels, eps=eps)
            return SpatialNorm(channels, latent_channels, groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, stream: Stream, z: Tensor | None = None) -> Tensor:
        y = self.conv1(self.norm1.silu(x, z, stream), stream)
        y = self.conv2(self.norm2.silu(y, z, stream), stream)
        if self.conv_shortcut is not None:
            x = ops.causal_conv3d(x, self.conv_shortcut.weight, self.conv_shortcut.bias)
        return y + x


class Downsample(nn.Module):
    """Halve height and width and, with ``time``, the frames: pairs are averaged, the first of an odd number is kept."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = FrameConv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time and x.shape[2] > 1:
            single = x.shape[2] % 2
            pairs = x[:, :, single:].unflatten(2, (-1, 2)).mean(3)
            x = torch.cat([x[:, :, :1], pairs], 2) if single else pairs
        return self.conv(F.pad(x, (0, 1, 0, 1)), stream)


class Upsample(nn.Module):
    """Double height and width and, with ``time``, the frames, except a single one or the first of an odd number."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = FrameConv(channels, channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        still = stream.begins_with_still(x)
        if not self.time or (still and x.shape[2] == 1):
            x = repeat(x, 1)
        elif not still:
            x = repeat(x, 2)
        else:
            x = torch.cat([repeat(x[:, :, :1], 1), repeat(x[:, :, 1:], 2)], 2)
        return self.conv(x, stream)


def repeat(x: Tensor, times: int) -> Tensor:
    """Each frame ``times`` over, each row and column twice."""
    return F.interpolate(x, scale_factor=(float(times), 2.0, 2.0))


class Level(nn.Module):
    """Residual blocks of one width, then a change of size, which the last level does not have."""

    def __init__(self, resnets: list[ResnetBlock], resampler: Downsample | Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([resampler]) if isinstance(resampler, Downsample) else None
        self.upsamplers = nn.ModuleList([resampler]) if isinstance(resampler, Upsample) else None

    def forward(self, x: Tensor, stream: Stream, z: Tensor | None = None) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, stream, z)
        for resampler in (*(self.downsamplers or ()), *(self.upsamplers or ())):
            x = resampler(x, stream)
        return x
