# SPDX-License-Identifier: Apache-2.0
"""Haar wavelet transform of videos over time, height and width, and back, as the WFVAE uses it (arXiv 2411.17459).

Bands are stacked filter-major along channels: band ``4 v + 2 a + c`` holds, for every channel of the video,
differences along time where v = 1, along height where a = 1, along width where c = 1, and sums elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import describe, require_floating
from ._draw import SIZES, SMALL_SIZES, draw, strided
from ._haar import analyse, require_bands, require_even, synthesise
from ._registry import Choose, Cost, Op

SCHEMA = "haar_3d(Tensor x, float filter_constant, bool repeat_first_frame) -> Tensor"
INVERSE_SCHEMA = "inverse_haar_3d(Tensor y, float filter_constant, bool drop_first_frame) -> Tensor"
LAYOUT = "(batch, channels, frames, height, width)"
DIMS = (2, 3, 4)


def check(x: Tensor, filter_constant: float, repeat_first_frame: bool) -> None:
    require_floating("haar_3d", "x", x, 5, LAYOUT)
    require_even("haar_3d", x)
    if x.shape[2] % 2 != int(repeat_first_frame):
        wanted = "odd (repeat_first_frame=True)" if repeat_first_frame else "even (repeat_first_frame=False)"
        raise ValueError(f"haar_3d: frames of x must be {wanted}, got {describe(x)}")


def inverse_check(y: Tensor, filter_constant: float, drop_first_frame: bool) -> None:
    require_floating("inverse_haar_3d", "y", y, 5, LAYOUT)
    require_bands("inverse_haar_3d", y, 8)
    if drop_first_frame and y.shape[2] == 0:
        raise ValueError(f"inverse_haar_3d: y must have a frame to drop (drop_first_frame=True), got {describe(y)}")


def reference(x: Tensor, filter_constant: float, repeat_first_frame: bool) -> Tensor:
    if repeat_first_frame:
        x = torch.cat((x[:, :, :1], x), 2)
    return analyse(x, DIMS, filter_constant)


def inverse_reference(y: Tensor, filter_constant: float, drop_first_frame: bool) -> Tensor:
    video = synthesise(y, DIMS, filter_constant)
    return video[:, :, 1:].clone(memory_format=torch.contiguous_format) if drop_first_frame else video


def out_shape(x: Tensor, filter_constant: float, repeat_first_frame: bool) -> tuple[int, ...]:
    batch, channels, frames, height, width = x.shape
    return batch, 8 * channels, (frames + int(repeat_first_frame)) // 2, height // 2, width // 2


def inverse_out_shape(y: Tensor, filter_constant: float, drop_first_frame: bool) -> tuple[int, ...]:
    batch, channels, frames, height, width = y.shape
    return batch, channels // 8, 2 * frames - int(drop_first_frame), 2 * height, 2 * width


def fake(x: Tensor, filter_constant: float, repeat_first_frame: bool) -> Tensor:
    return x.new_empty(out_shape(x, filter_constant, repeat_first_frame))


def inverse_fake(y: Tensor, filter_constant: float, drop_first_frame: bool) -> Tensor:
    return y.new_empty(inverse_out_shape(y, filter_constant, drop_first_frame))


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.filter_constant, ctx.edge = inputs


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose is the synthesis; the frame that was read twice collects both of its gradients."""
    grad_x = inverse_op(grad, ctx.filter_constant, ctx.edge)
    if ctx.edge:
        both = inverse_op(grad[:, :, :1], ctx.filter_constant, False).sum(2, keepdim=True)
        grad_x = torch.cat((both, grad_x[:, :, 1:]), 2)
    return grad_x, None, None


def inverse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose is the analysis; the frame that was dropped counts as zero."""
    if ctx.edge:
        grad = torch.cat((torch.zeros_like(grad[:, :, :1]), grad), 2)
    return op(grad, ctx.filter_constant, False), None, None


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 1, 2, 2), 0.3536, True),
        (new(2, 3, 3, 4, 6), 0.3536, True),
        (new(1, 2, 4, 2, 10), 0.5, False),
        (new(1, 1, 1, 2, 138), 0.3536, True),
        (new(1, 4, 3, 2, 8)[:, 1:3], 0.3536, True),
        (new(1, 3, 4, 6, 2).permute(0, 4, 1, 2, 3), 0.3536, True),
        (new(0, 3, 3, 4, 4), 0.3536, True),
        (new(1, 3, 0, 4, 4), 0.3536, False),
        (new(1, 3, 3, 4, 0), 0.3536, True),
    ]


def inverse_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 8, 1, 1, 1), 0.3536, True),
        (new(2, 16, 2, 2, 3), 0.3536, True),
        (new(1, 8, 2, 1, 5), 0.5, False),
        (new(1, 8, 1, 1, 69), 0.3536, False),
        (new(1, 20, 2, 1, 4)[:, 2:18], 0.3536, True),
        (new(1, 2, 2, 3, 8).permute(0, 4, 1, 2, 3), 0.3536, True),
        (new(0, 8, 3, 4, 4), 0.3536, True),
        (new(1, 8, 0, 4, 4), 0.3536, False),
        (new(1, 8, 3, 4, 0), 0.3536, True),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        "1x3x17x256x256": lambda: (draw((1, 3, 17, 256, 256), device, dtype), 0.3536, True),
        "1x3x49x352x640": lambda: (draw((1, 3, 49, 352, 640), device, dtype), 0.3536, True),
    }


def inverse_workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        "1x24x9x128x128": lambda: (draw((1, 24, 9, 128, 128), device, dtype), 0.3536, True),
        "1x24x25x176x320": lambda: (draw((1, 24, 25, 176, 320), device, dtype), 0.3536, True),
    }


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    repeat = choose((True, False))
    frames = choose((1, 3, 5) if repeat else (0, 2, 4))
    shape = (choose((0, 1, 2)), choose((0, 1, 3)), frames, 2 * choose((0, 1, 2)), 2 * choose(SIZES))
    return strided(choose, shape, device, dtype), choose((0.3536, 1.0)), repeat


def inverse_random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    drop = choose((True, False))
    frames = choose((1, 2, 3) if drop else SMALL_SIZES)
    shape = (choose((0, 1, 2)), 8 * choose((0, 1, 2)), frames, choose((0, 1, 2)), choose(SIZES))
    return strided(choose, shape, device, dtype), choose((0.3536, 1.0)), drop


def cost(x: Tensor, *args: Any) -> Cost:
    written = x.new_empty(out_shape(x, *args), device="meta").numel()
    return Cost(bytes=(x.numel() + written) * x.element_size())


def inverse_cost(y: Tensor, *args: Any) -> Cost:
    written = y.new_empty(inverse_out_shape(y, *args), device="meta").numel()
    return Cost(bytes=(y.numel() + written) * y.element_size())


op = Op(
    SCHEMA,
    check,
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    save=save,
    backward=backward,
    out_shape=out_shape,
)
inverse_op = Op(
    INVERSE_SCHEMA,
    inverse_check,
    inverse_reference,
    inverse_samples,
    inverse_workloads,
    inverse_random_args,
    inverse_cost,
    fake=inverse_fake,
    save=save,
    backward=inverse_backward,
    out_shape=inverse_out_shape,
)


def haar_3d(
    x: Tensor, *, filter_constant: float = 0.3536, repeat_first_frame: bool = True, out: Tensor | None = None
) -> Tensor:
    """Eight wavelet bands of a video at half its size, computed in float32 (float64 stays float64).

    Output frame t is made of frames 2t - 1 and 2t of the video (t = 0: of frame 0 twice). Its band ``4 v + 2 a + c`` is
    ``filter_constant`` times the sum over dt, dy, dx in {0, 1} of
    ``(-1)^(v dt + a dy + c dx) * x[2t - 1 + dt, 2h + dy, 2w + dx]``.

    Args:
        x: ``(batch, channels, frames, height, width)``, any strides; height and width even.
        filter_constant: every tap's magnitude. The released WFVAE weights want the rounded 0.3536, with which
            analysis and synthesis together have gain 8 * 0.3536^2 = 1.00026; 8 ** -0.5 makes them exact inverses.
        repeat_first_frame: True (a whole video, or its first chunk): frames is odd, and the first frame is paired
            with itself. False (chunks after the first): frames is even, and frames 2t and 2t + 1 are paired.
        out: contiguous tensor of the result's shape and dtype to write into (no autograd).

    Returns:
        Contiguous ``(batch, 8 * channels, ceil(frames / 2), height / 2, width / 2)`` of ``x``'s dtype, band-major.

    Raises:
        ValueError: rank, dtype, an odd height or width, or a frame count that does not fit ``repeat_first_frame``.
    """
    args = (x, filter_constant, repeat_first_frame)
    return op(*args) if out is None else op.into(out, *args)


def inverse_haar_3d(
    y: Tensor, *, filter_constant: float = 0.3536, drop_first_frame: bool = True, out: Tensor | None = None
) -> Tensor:
    """The video of which ``y`` holds the eight bands: the transpose of :func:`haar_3d`, computed in float32.

    Args:
        y: ``(batch, 8 * channels, frames, height, width)``, band-major as from :func:`haar_3d`, any strides.
        filter_constant: as in :func:`haar_3d`.
        drop_first_frame: True (a whole video, or its first chunk): leave out the first frame, which only repeats the
            second. False (chunks after the first): keep all.
        out: contiguous tensor of the result's shape and dtype to write into (no autograd).

    Returns:
        Contiguous ``(batch, channels, 2 * frames - int(drop_first_frame), 2 * height, 2 * width)`` of ``y``'s dtype.

    Raises:
        ValueError: rank, dtype, channels not a multiple of 8, or no frame to drop.
    """
    args = (y, filter_constant, drop_first_frame)
    return inverse_op(*args) if out is None else inverse_op.into(out, *args)
