# SPDX-License-Identifier: Apache-2.0
"""Layers of HunyuanVideo's autoencoder, all on ``(batch, channels, frames, height, width)``."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops

NORM_EPS = 1e-6
Factors = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame. Edges are repeated: in space on both sides, in time before the first."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: Factors = (1, 1, 1)) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)  # holds the weights; the op computes

    def forward(self, x: Tensor) -> Tensor:
        if self.padding:
            x = F.pad(x, (self.padding,) * 4 + (2 * self.padding, 0), mode="replicate")
        # what stands in front is padded already, in the same copy
        return ops.causal_conv3d(x, self.conv.weight, self.conv.bias, stride=self.stride, cache=x[:, :, :0].detach())


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)


class Resnet(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(norm_silu(self.norm2, self.conv1(norm_silu(self.norm1, x))))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """``x + to_out(attention(norm(x)))`` with one head; a position sees all positions of its own and earlier frames."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        frames, area = x.shape[2], x.shape[3] * x.shape[4]
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (layer(tokens).unsqueeze(2) for layer in (self.to_q, self.to_k, self.to_v))
        # frame by frame, the keys that a frame sees are a slice: no mask of (T H W)^2 entries
        attended = [
            cast(Tensor, ops.attention(q[:, i * area : (i + 1) * area], k[:, : (i + 1) * area], v[:, : (i + 1) * area]))
            for i in range(frames)
        ]
        y = self.to_out[0](torch.cat(attended, 1).squeeze(2))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([FrameCausalAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Downsample(nn.Module):
    """T frames to ``(T - 1) // 2 + 1`` where time is halved, height and width alike."""

    def __init__(self, channels: int, stride: Factors) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Repeat pixels, and frames but the first: T frames to ``1 + f (T - 1)``, then a convolution."""

    def __init__(self, channels: int, factors: Factors) -> None:
        super().__init__()
        self.factors = factors
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        time, rows, columns = self.factors
        if time > 1:
            source = (torch.arange(1 + time * (x.shape[2] - 1), device=x.device) + time - 1) // time
            x = x.index_select(2, source)
        height, width = x.shape[3:]
        x = x[:, :, :, :, None, :, None].expand(-1, -1, -1, -1, rows, -1, columns)
        return self.conv(x.reshape(*x.shape[:3], height * rows, width * columns))


class Level(nn.Module):
    """Residual blocks, then a resampling where the level has one."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x
