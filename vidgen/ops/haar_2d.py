# SPDX-License-Identifier: Apache-2.0
"""Haar wavelet transform of images, or of each frame of videos, over height and width, and back (WFVAE, v1.3 form).

Bands are stacked filter-major along channels: band ``2 c + a`` holds, for every channel, differences along width
where c = 1, along height where a = 1, and sums elsewhere. (haar_3d counts height before width: its released
weights say so.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import describe
from ._draw import SIZES, draw, strided
from ._haar import analyse, require_bands, require_even, synthesise
from ._registry import Choose, Cost, Op

SCHEMA = "haar_2d(Tensor x, float filter_constant) -> Tensor"
INVERSE_SCHEMA = "inverse_haar_2d(Tensor y, float filter_constant) -> Tensor"


def check(x: Tensor, filter_constant: float) -> None:
    require_images("haar_2d", "x", x)
    require_even("haar_2d", x)


def inverse_check(y: Tensor, filter_constant: float) -> None:
    require_images("inverse_haar_2d", "y", y)
    require_bands("inverse_haar_2d", y, 4)


def require_images(op: str, name: str, t: Tensor) -> None:
    if t.dim() not in (4, 5) or not t.is_floating_point():
        layout = "(batch, channels, height, width) or (batch, channels, frames, height, width)"
        raise ValueError(f"{op}: {name} must be floating point {layout}, got {describe(t)}")


def dims(t: Tensor) -> tuple[int, int]:
    return t.dim() - 1, t.dim() - 2


def reference(x: Tensor, filter_constant: float) -> Tensor:
    return analyse(x, dims(x), filter_constant)


def inverse_reference(y: Tensor, filter_constant: float) -> Tensor:
    return synthesise(y, dims(y), filter_constant)


def out_shape(x: Tensor, filter_constant: float) -> tuple[int, ...]:
    return x.shape[0], 4 * x.shape[1], *x.shape[2:-2], x.shape[-2] // 2, x.shape[-1] // 2


def inverse_out_shape(y: Tensor, filter_constant: float) -> tuple[int, ...]:
    return y.shape[0], y.shape[1] // 4, *y.shape[2:-2], 2 * y.shape[-2], 2 * y.shape[-1]


def fake(x: Tensor, filter_constant: float) -> Tensor:
    return x.new_empty(out_shape(x, filter_constant))


def inverse_fake(y: Tensor, filter_constant: float) -> Tensor:
    return y.new_empty(inverse_out_shape(y, filter_constant))


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.filter_constant = inputs


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return inverse_op(grad, ctx.filter_constant), None


def inverse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return op(grad, ctx.filter_constant), None


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 2, 2), 0.5),
        (new(2, 3, 4, 6), 0.5),
        (new(1, 2, 3, 4, 10), 1.0),
        (new(1, 1, 2, 138), 0.5),
        (new(1, 4, 2, 2, 8)[:, 1:3], 0.5),
        (new(1, 4, 6, 2).permute(0, 3, 1, 2), 0.5),
        (new(0, 3, 4, 4), 0.5),
        (new(1, 3, 0, 4, 4), 0.5),
    ]


def inverse_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 4, 1, 1), 0.5),
        (new(2, 8, 2, 3), 0.5),
        (new(1, 4, 3, 2, 5), 1.0),
        (new(1, 4, 1, 69), 0.5),
        (new(1, 10, 2, 1, 4)[:, 1:9], 0.5),
        (new(1, 2, 3, 8).permute(0, 3, 1, 2), 0.5),
        (new(0, 4, 4, 4), 0.5),
        (new(1, 4, 0, 4, 4), 0.5),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {"1x3x17x256x256": lambda: (draw((1, 3, 17, 256, 256), device, dtype), 0.5)}


def inverse_workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {"1x12x17x128x128": lambda: (draw((1, 12, 17, 128, 128), device, dtype), 0.5)}


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    frames = choose(((), (0,), (1,), (3,)))
    shape = (choose((0, 1, 2)), choose((0, 1, 3)), *frames, 2 * choose((0, 1, 2)), 2 * choose(SIZES))
    return strided(choose, shape, device, dtype), choose((0.5, 1.0))


def inverse_random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    frames = choose(((), (0,), (1,), (3,)))
    shape = (choose((0, 1, 2)), 4 * choose((0, 1, 2)), *frames, choose((0, 1, 2)), choose(SIZES))
    return strided(choose, shape, device, dtype), choose((0.5, 1.0))


def cost(x: Tensor, *_: Any) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size())


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
    cost,
    fake=inverse_fake,
    save=save,
    backward=inverse_backward,
    out_shape=inverse_out_shape,
)


def haar_2d(x: Tensor, *, filter_constant: float = 0.5, out: Tensor | None = None) -> Tensor:
    """Four wavelet bands of images at half their size, computed in float32 (float64 stays float64).

    Band ``2 c + a`` is ``filter_constant * sum over (dy, dx) in {0, 1}^2 of (-1)^(a dy + c dx) * x[2h + dy, 2w + dx]``.

    Args:
        x: ``(batch, channels, height, width)`` or ``(batch, channels, frames, height, width)``, any strides; height
            and width even.
        filter_constant: every tap's magnitude; 0.5, which the released weights want, makes the transform orthonormal.
        out: contiguous tensor of the result's shape and dtype to write into (no autograd).

    Returns:
        Contiguous ``(batch, 4 * channels, [frames,] height / 2, width / 2)`` of ``x``'s dtype, band-major.

    Raises:
        ValueError: rank, dtype, or an odd height or width.
    """
    args = (x, filter_constant)
    return op(*args) if out is None else op.into(out, *args)


def inverse_haar_2d(y: Tensor, *, filter_constant: float = 0.5, out: Tensor | None = None) -> Tensor:
    """The images of which ``y`` holds the four bands: the transpose of :func:`haar_2d`, computed in float32.

    Args:
        y: ``(batch, 4 * channels, height, width)`` or ``(batch, 4 * channels, frames, height, width)``, band-major as
            from :func:`haar_2d`, any strides.
        filter_constant: as in :func:`haar_2d`.
        out: contiguous tensor of the result's shape and dtype to write into (no autograd).

    Returns:
        Contiguous ``(batch, channels, [frames,] 2 * height, 2 * width)`` of ``y``'s dtype.

    Raises:
        ValueError: rank, dtype, or channels not a multiple of 4.
    """
    args = (y, filter_constant)
    return inverse_op(*args) if out is None else inverse_op.into(out, *args)
