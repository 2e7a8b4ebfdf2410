# SPDX-License-Identifier: Apache-2.0
"""3-D convolution that sees no future frames, as causal video autoencoders use it (MAGVIT-v2, arXiv 2310.05737)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import describe, require_device, require_floating, require_like, wide
from ._draw import draw, strided
from ._registry import Choose, Cost, Op

SCHEMA = (
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, int[3] stride, int[3] dilation, int[2] spatial_padding, "
    "Tensor? cache) -> Tensor"
)
LAYOUT = "(batch, channels, frames, height, width)"


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    spatial_padding: Sequence[int],
    cache: Tensor | None,
) -> None:
    name = "causal_conv3d"
    require_floating(name, "x", x, 5, LAYOUT)
    if weight.dim() != 5 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        wanted = f"(out_channels, {x.shape[1]}, kernel_frames, kernel_height, kernel_width) of {x.dtype}"
        raise ValueError(f"{name}: weight must be {wanted}, got {describe(weight)}")
    require_device(name, "weight", weight, x)
    if bias is not None:
        require_like(name, "bias", bias, (weight.shape[0],), x)
    if cache is not None:
        wanted_cache = (*x.shape[:2], cache.shape[2] if cache.dim() == 5 else -1, *x.shape[3:])
        require_like(name, "cache", cache, wanted_cache, x)
    for argument, values, count, least in (
        ("stride", stride, 3, 1),
        ("dilation", dilation, 3, 1),
        ("spatial_padding", spatial_padding, 2, 0),
    ):
        if len(values) != count or min(values) < least:
            raise ValueError(f"{name}: {argument} must be {count} integers of at least {least}, got {tuple(values)}")
    if x.shape[2] == 0:
        raise ValueError(f"{name}: x must have at least one frame, got {describe(x)}")
    have = padded_sizes(x, weight, dilation, spatial_padding, cache)
    need = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    if any(h < n for h, n in zip(have, need, strict=True)):
        raise ValueError(
            f"{name}: the kernel covers {tuple(need)} (frames, height, width) but x with its padding or cache has only "
            f"{tuple(have)}"
        )


def frames_in_front(weight: Tensor, dilation: Sequence[int], cache: Tensor | None) -> int:
    return (weight.shape[2] - 1) * dilation[0] if cache is None else cache.shape[2]


def padded_sizes(
    x: Tensor, weight: Tensor, dilation: Sequence[int], spatial_padding: Sequence[int], cache: Tensor | None
) -> tuple[int, int, int]:
    frames, height, width = x.shape[2:]
    in_front = frames_in_front(weight, dilation, cache)
    return frames + in_front, height + 2 * spatial_padding[0], width + 2 * spatial_padding[1]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    spatial_padding: Sequence[int],
    cache: Tensor | None,
) -> Tensor:
    if cache is None:
        in_front = frames_in_front(weight, dilation, None)
        padded = x[:, :, [max(t - in_front, 0) for t in range(x.shape[2] + in_front)]]
    else:
        padded = torch.cat((cache, x), 2)
    up, left = spatial_padding
    windows = F.pad(wide(padded), (left, left, up, up))
    for dim, kernel in enumerate(weight.shape[2:]):
        window = dilation[dim] * (kernel - 1) + 1
        windows = windows.unfold(2 + dim, window, stride[dim])[..., :: dilation[dim]]
    y = torch.einsum("bcthwijk,ocijk->bothw", windows, wide(weight))
    return (y if bias is None else y + wide(bias).view(-1, 1, 1, 1)).to(x.dtype)


def composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    spatial_padding: Sequence[int],
    cache: Tensor | None,
) -> Tensor:
    if wants_channels_last(x, weight):
        x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, weight))
    front = [x[:, :, :1]] * frames_in_front(weight, dilation, None) if cache is None else [cache]
    if any(frames.shape[2] or frames.requires_grad for frames in front):  # an empty cache costs no copy
        x = torch.cat((*front, x), 2)
    if is_left_to_slow_kernel(x, weight):
        return conv_by_frames(x, weight, bias, stride, dilation, spatial_padding)
    return F.conv3d(x, weight, bias, stride, (0, *spatial_padding), dilation)


def is_left_to_slow_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch would not give the convolution to oneDNN: one float32 video of few values (aten's use_mkldnn).

    On one thread, forward and backward of 3x3x3 kernels take 1.5 to 9 times as long there as by frames.
    """
    small = x.shape[0] == 1 and x.shape[1] * x.shape[2] * x.shape[3] <= 20480
    return small and x.device.type == "cpu" and x.dtype == torch.float32 and weight.shape[2] > 1


def conv_by_frames(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    spatial_padding: Sequence[int],
) -> Tensor:
    """The frames that an output frame sees, stacked along channels, in one 2-D convolution."""
    kernel = weight.shape[2]
    count = (x.shape[2] - dilation[0] * (kernel - 1) - 1) // stride[0] + 1
    last = (count - 1) * stride[0] + 1
    taps = [x[:, :, tap * dilation[0] :][:, :, : last : stride[0]] for tap in range(kernel)]
    frames = torch.cat(taps, 1).transpose(1, 2).flatten(0, 1)
    flat_weight = weight.transpose(1, 2).flatten(1, 2)
    y = F.conv2d(frames, flat_weight, bias, stride[1:], spatial_padding, dilation[1:])
    return y.unflatten(0, (x.shape[0], count)).transpose(1, 2).contiguous()


def wants_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution is faster in that memory format even where ``x`` has to be copied into it.

    Measured on one thread, bfloat16 3x3x3 kernels: 1.6 to 2.7 times faster with AMX, 1.02 to 1.06 times without
    (0.92 to 1.01 times where every call copies). In float32 the two are equal, and so ``x`` keeps the format that it
    has. A kernel of one position saves less than the copy costs (0.6 times), but once in the format stays in it.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and weight.shape[2:].numel() > 1


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    unit, none = (1, 1, 1), (0, 0)
    return [
        (new(1, 1, 1, 1, 1), new(1, 1, 1, 1, 1), None, unit, unit, none, None),
        (new(1, 3, 3, 4, 3), new(2, 3, 3, 3, 3), new(2), unit, unit, (1, 1), None),
        (new(2, 2, 3, 4, 5), new(2, 2, 3, 3, 3), new(2), (2, 2, 2), unit, none, None),
        (new(1, 2, 2, 3, 3), new(2, 2, 3, 3, 3), new(2), unit, unit, (1, 1), new(1, 2, 2, 3, 3)),
        (new(1, 2, 3, 3, 3), new(1, 2, 3, 1, 1), new(1), unit, (2, 1, 1), none, new(1, 2, 3, 3, 3)),
        (new(1, 2, 3, 3, 3), new(1, 2, 2, 1, 2), None, unit, (2, 1, 2), (0, 1), new(1, 2, 0, 3, 3)),
        (new(1, 2, 3, 4, 2).permute(0, 4, 1, 2, 3), new(3, 2, 1, 1, 1), new(3), unit, unit, none, None),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    def block(channels: int, frames: int, size: int) -> tuple[Any, ...]:
        x = draw((1, channels, frames, size, size), device, dtype)
        weight = draw((channels, channels, 3, 3, 3), device, dtype) * (27 * channels) ** -0.5
        return x, weight, draw((channels,), device, dtype), (1, 1, 1), (1, 1, 1), (1, 1), None

    return {
        "1x128x5x64x64 3x3x3": lambda: block(128, 5, 64),
        "1x320x3x32x32 3x3x3": lambda: block(320, 3, 32),
    }


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    kernel = tuple(choose((1, 2, 3)) for _ in range(3))
    stride, dilation = tuple(choose((1, 2)) for _ in range(3)), tuple(choose((1, 2)) for _ in range(3))
    batch, channels, out_channels = choose((0, 1, 2)), choose((1, 2, 5)), choose((1, 3))
    frames = choose((1, 2, 5))
    height, width = choose((5, 6, 8)), choose((5, 7, 17))
    needed = (kernel[0] - 1) * dilation[0] + 1 - frames
    cache_frames = choose((None, max(needed, 0), max(needed, 0) + 1))

    def new(*shape: int) -> Tensor:
        return strided(choose, shape, device, dtype)

    cache = None if cache_frames is None else new(batch, channels, cache_frames, height, width)
    # The library adds products in an order of its own; results below one leave room for its roundings.
    weight = 0.05 * new(out_channels, channels, *kernel)
    bias = 0.05 * new(out_channels) if choose((True, False)) else None
    padding = (choose((0, 1)), choose((0, 1)))
    return new(batch, channels, frames, height, width), weight, bias, stride, dilation, padding, cache


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    spatial_padding: Sequence[int],
    cache: Tensor | None,
) -> Cost:
    positions = x.shape[0]
    sizes = padded_sizes(x, weight, dilation, spatial_padding, cache)
    for size, kernel, step, gap in zip(sizes, weight.shape[2:], stride, dilation, strict=True):
        positions *= (size - gap * (kernel - 1) - 1) // step + 1
    moved = x.numel() + weight.numel() + positions * weight.shape[0]
    return Cost(bytes=moved * x.element_size(), flops=2 * positions * weight.numel())


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, composite=composite)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    dilation: tuple[int, int, int] = (1, 1, 1),
    spatial_padding: tuple[int, int] = (0, 0),
    cache: Tensor | None = None,
) -> Tensor:
    """``conv3d`` over ``cat(front, x)``: output frame t depends on input frames up to ``t * stride[0]`` only.

    ``front`` is the first frame, repeated ``(kernel_frames - 1) * dilation[0]`` times, or ``cache``. A long video
    gives the same result in chunks when each chunk's cache holds the last frames that the chunk before it convolved.

    Args:
        x: ``(batch, channels, frames, height, width)``, any strides, at least one frame.
        weight: ``(out_channels, channels, kernel_frames, kernel_height, kernel_width)``, dtype and device of ``x``.
            Kept in ``torch.channels_last_3d``, bfloat16 weights on CPU need no copy per call.
        bias: ``(out_channels)``.
        stride, dilation: for (frames, height, width).
        spatial_padding: zeros on either side of (height, width).
        cache: ``(batch, channels, any number of frames, height, width)`` to put in front instead of the repeated
            first frame; with zero frames, nothing is put in front.

    Returns:
        ``(batch, out_channels, out_frames, out_height, out_width)`` of ``x``'s dtype, in the memory format that the
        convolution chose (``torch.channels_last_3d`` for bfloat16 on CPU).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the kernel is larger than the padded input.
    """
    return op(x, weight, bias, stride, dilation, spatial_padding, cache)
