# SPDX-License-Identifier: Apache-2.0
"""Layers of HunyuanVideo's autoencoder, all on ``(batch, channels, frames, height, width)`` and a Stream.

Norms span the whole video, so that it is no chunks in time that pass, but the Stream may spread it over processes.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops

from .streaming import Stream

NORM_EPS = 1e-6
Factors = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame. Edges are repeated: in space on both sides, in time before the first."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: Factors = (1, 1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)  # holds the weights; the op computes

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        front = stream.front(self, x, self.kernel, self.stride[0])
        if self.padding:
            repeated = 2 * self.padding if front is None else 0
            x = x if front is None else torch.cat((front, x), 2)
            x = F.pad(x, (self.padding,) * 4 + (repeated, 0), mode="replicate")
        # what stands in front is padded already, in the same copy
        return ops.causal_conv3d(x, self.conv.weight, self.conv.bias, stride=self.stride, cache=x[:, :, :0].detach())


class Resnet(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(stream.group_norm(self.norm1, x, silu=True), stream)
        y = self.conv2(stream.group_norm(self.norm2, y, silu=True), stream)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, stream))


class FrameCausalAttention(nn.Module):
    """``x + to_out(attention(norm(x)))`` with one head; a position sees all positions of its own and earlier frames."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        area = x.shape[3] * x.shape[4]
        tokens = stream.group_norm(self.group_norm, x.flatten(2), silu=False).transpose(1, 2)
        q, k, v = (layer(tokens).unsqueeze(2) for layer in (self.to_q, self.to_k, self.to_v))
        k, v = stream.with_earlier(k, v)
        # frame by frame, the keys that a frame sees are a slice: no mask of (T H W)^2 entries
        ends = range(area, q.shape[1] + 1, area)
        seen = [end + k.shape[1] - q.shape[1] for end in ends]
        attended = [
            cast(Tensor, ops.attention(q[:, end - area : end], k[:, :keys], v[:, :keys]))
            for end, keys in zip(ends, seen, strict=True)
        ]
        y = self.to_out[0](torch.cat(attended, 1).squeeze(2))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x, stream)
        return x


class Downsample(nn.Module):
    """T frames to ``(T - 1) // 2 + 1`` where time is halved, height and width alike."""

    def __init__(self, channels: int, stride: Factors) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(x, stream)


class Upsample(nn.Module):
    """Repeat pixels, and frames but the first: T frames to ``1 + f (T - 1)``, then a convolution."""

    def __init__(self, channels: int, factors: Factors) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        time, rows, columns = self.factors
        if time > 1:
            left_out = time - 1 if stream.first else 0  # copies of the first frame
            x = x.index_select(2, torch.arange(left_out, time * x.shape[2], device=x.device) // time)
        height, width = x.shape[3:]
        x = x[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, rows, -1, columns)
        return self.conv(x.reshape(*x.shape[:3], height * rows, width * columns), stream)


class Level(nn.Module):
    """Residual blocks, then a resampling where the level has one."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x, stream)
        return x
