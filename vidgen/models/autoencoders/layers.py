# SPDX-License-Identifier: Apache-2.0
"""Layers of causal video autoencoders. Each takes ``(batch, channels, frames, height, width)`` and a Stream.

What a layer keeps of a video that comes in chunks, and why nothing more is needed, stands with the layer. Activations
stay in the memory format that ``ops.causal_conv3d`` returns for their dtype.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops
from vidgen.ops.causal_conv3d import wants_channels_last

from .streaming import Stream

NORM_EPS = 1e-6
GROUPS = 32


class Chain(nn.Sequential):
    """Layers in a row, all of the same video."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, stream)
        return x


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame. Before the first frame stand copies of it; in space there are zeros.

    With kernel k and stride s in time, output n reads frames ``n s`` to ``n s + k - 1`` of the front and the video
    together. The frames that later outputs still need are kept, and stand in front of the next chunk.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)  # holds the weights; the op computes

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return ops.causal_conv3d(
            x,
            self.conv.weight,
            self.conv.bias,
            stride=(self.stride,) * 3,
            spatial_padding=(self.padding,) * 2,
            cache=stream.front(self, x, self.kernel, self.stride),
        )


class FrameConv(nn.Conv2d):
    """3x3 convolution of each frame by itself."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, padding: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        if wants_channels_last(x, self.weight):
            x = x.contiguous(memory_format=torch.channels_last_3d)
            # The strides of transpose(1, 2) would not show the format where there is only one frame.
            frames = x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)
        else:
            frames = x.transpose(1, 2).flatten(0, 1)
        return super().forward(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def silu(self, x: Tensor, stream: Stream) -> Tensor:
        """SiLU of the normalised ``x``."""
        return ops.layer_norm_silu(x, self.norm.weight, self.norm.bias, eps=NORM_EPS)

    def tokens(self, x: Tensor, stream: Stream) -> Tensor:
        """The normalised ``x`` with its channels last, ``(batch, frames, height, width, channels)``."""
        return self.norm(x.permute(0, 2, 3, 4, 1))


class VideoGroupNorm(nn.GroupNorm):
    """GroupNorm over groups of channels and a whole video: its results depend on all frames, so it has no chunks."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=NORM_EPS)

    def silu(self, x: Tensor, stream: Stream) -> Tensor:
        """SiLU of the normalised ``x``."""
        return stream.group_norm(self, x, silu=True)

    def tokens(self, x: Tensor, stream: Stream) -> Tensor:
        """The normalised ``x`` with its channels last, ``(batch, frames, height, width, channels)``."""
        return stream.group_norm(self, x, silu=False).permute(0, 2, 3, 4, 1)


class FrameGroupNorm(VideoGroupNorm):
    """GroupNorm of each frame by itself."""

    def silu(self, x: Tensor, stream: Stream) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        frames = ops.group_norm_silu(frames, GROUPS, self.weight, self.bias, eps=NORM_EPS)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def make_norm(kind: str, channels: int, *, frames_apart: bool = False) -> ChannelNorm | VideoGroupNorm:
    """``"layernorm"`` or ``"groupnorm"``, the latter over whole videos or each frame by itself."""
    if kind == "layernorm":
        return ChannelNorm(channels)
    if kind != "groupnorm":
        raise ValueError(f"make_norm: kind must be 'layernorm' or 'groupnorm', got {kind!r}")
    return FrameGroupNorm(channels) if frames_apart else VideoGroupNorm(channels)


class ResBlock(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``, causal in time or, with ``frames_apart``, frame by frame."""

    def __init__(
        self, in_channels: int, out_channels: int, *, frames_apart: bool = False, norm: str = "layernorm"
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, in_channels, frames_apart=frames_apart)
        self.conv1 = _conv3x3(in_channels, out_channels, frames_apart)
        self.norm2 = make_norm(norm, out_channels, frames_apart=frames_apart)
        self.conv2 = _conv3x3(out_channels, out_channels, frames_apart)
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = self.conv1(self.norm1.silu(x, stream), stream)
        y = self.conv2(self.norm2.silu(y, stream), stream)
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x, stream))


def _conv3x3(in_channels: int, out_channels: int, frames_apart: bool) -> CausalConv3d | FrameConv:
    if frames_apart:
        return FrameConv(in_channels, out_channels)
    return CausalConv3d(in_channels, out_channels, 3, padding=1)


class FrameAttention(nn.Module):
    """``x + proj_out(attention(norm(x)))`` over the positions of each frame, with one head. It keeps nothing."""

    def __init__(self, channels: int, *, norm: str = "layernorm") -> None:
        super().__init__()
        self.norm = make_norm(norm, channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        batch, channels, frames, height, width = x.shape
        tokens = self.norm.tokens(x, stream).reshape(batch * frames, height * width, 1, channels)
        q, k, v = (_pointwise(layer, tokens) for layer in (self.q, self.k, self.v))
        y = _pointwise(self.proj_out, cast(Tensor, ops.attention(q, k, v))).view(batch, frames, height, width, channels)
        return x + y.permute(0, 4, 1, 2, 3)


def _pointwise(layer: CausalConv3d, tokens: Tensor) -> Tensor:
    """A 1x1x1 convolution of ``(..., channels)``."""
    return F.linear(tokens, layer.conv.weight.flatten(1), layer.conv.bias)


class Downsample3D(nn.Module):
    """Halve time, height and width: T frames to (T - 1) / 2 + 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), stream)


class Downsample2D(nn.Module):
    """Halve height and width of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), stream)


class Upsample2D(nn.Module):
    """Double height and width of each frame: every pixel becomes four, which are then convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(x.repeat_interleave(2, 3).repeat_interleave(2, 4), stream)


class Upsample3D(nn.Module):
    """Double time, height and width: T frames to 2T - 1, interpolated linearly in float32, then convolved.

    The first frame is a still: it is only enlarged. The others, r[0] to r[n-1], are doubled in time. With
    ``t_interpolation="nearest"`` each stands twice, and nothing is kept. Else they are doubled with half-pixel
    centres: ``out[2i] = r[i-1]/4 + 3 r[i]/4`` and ``out[2i+1] = 3 r[i]/4 + r[i+1]/4``, with r[-1] = r[0] and
    r[n] = r[n-1]. So ``out[2i+1]`` must wait for frame i + 1 or for the end of the video. The last frame is kept;
    with it in front of the next chunk, all outputs between neighbouring frames are known, and those at the outer edge
    of the chunk are wrong (they repeat the edge) and cut off, unless the edge is the video's own. Where the next frame
    is known after all, it stands behind the chunk, and its own two outputs are cut off.
    """

    def __init__(self, channels: int, *, t_interpolation: str = "trilinear") -> None:
        super().__init__()
        self.nearest = t_interpolation == "nearest"
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        previous, following = (None, None) if self.nearest else stream.neighbours(self, x)
        parts = []
        if stream.first:
            parts.append(_interpolate(x[:, :, :1], (1, 2, 2)))
            x = x[:, :, 1:]
        if x.shape[2] and self.nearest:
            parts.append(_interpolate(x, (1, 2, 2)).repeat_interleave(2, 2))
        elif x.shape[2]:
            seen = [frames for frames in (previous, x, following) if frames is not None]
            doubled = _interpolate(x if len(seen) == 1 else torch.cat(seen, 2), (2, 2, 2))
            start = None if previous is None else stream.given_of_previous
            stop = None if stream.last else -1 if following is None else -2
            parts.append(doubled[:, :, start:stop])
        return self.conv(parts[0] if len(parts) == 1 else torch.cat(parts, 2), stream)


def _interpolate(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    scale = tuple(float(factor) for factor in factors)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, scale_factor=scale, mode="trilinear", align_corners=False).to(x.dtype)


def split_channels(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` channels and the others, each in the memory format of ``x``, which plain views would lose."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    memory_format = torch.channels_last_3d if last else torch.contiguous_format
    return x[:, :count].contiguous(memory_format=memory_format), x[:, count:].contiguous(memory_format=memory_format)


class Delay(nn.Module):
    """Holds frames back until they are asked for: two paths of a decoder lag behind by different numbers of frames."""

    def forward(self, x: Tensor, frames: int, stream: Stream) -> Tensor:
        """The oldest ``frames`` of what is held and ``x``; the rest is held."""
        held = stream.recall(self)
        x = x if held is None else torch.cat((held, x), 2)
        stream.keep(self, x[:, :, frames:])
        return x[:, :, :frames]
