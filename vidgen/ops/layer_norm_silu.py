# SPDX-License-Identifier: Apache-2.0
"""LayerNorm over the channels at each position, followed by SiLU, as the wavelet-flow autoencoder uses them
(WF-VAE, arXiv 2411.17459)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import wide
from ._draw import SIZES, draw
from ._norm_silu import check_volume, empty_like, random_parameter, random_volume, rounded_like, volume
from ._registry import Choose, Cost, Op
from .layer_norm_silu_backward import op as layer_norm_silu_backward

SCHEMA = "layer_norm_silu(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor"


def check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_volume("layer_norm_silu", x, weight, bias)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    rows = wide(x).movedim(1, -1)
    normalised = F.layer_norm(rows, rows.shape[-1:], wide(weight), wide(bias), eps)
    return rounded_like(F.silu(normalised).movedim(-1, 1), x)


def fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return empty_like(x)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *layer_norm_silu_backward(grad, *ctx.saved_tensors, ctx.eps), None


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 1), new(1), new(1), 1e-6),
        resnet((2, 6, 2, 3, 5), False, device, dtype),
        resnet((2, 6, 2, 3, 5), True, device, dtype),
        resnet((1, 70, 2, 2), True, device, dtype),
        resnet((1, 3, 70), False, device, dtype),
        (new(0, 4, 3), new(4), new(4), 1e-6),
        (new(2, 4, 0, 3), new(4), new(4), 1e-6),
        (new(2, 7, 6).transpose(1, 2), new(6), new(6), 1e-5),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    shape = (1, 160, 5, 128, 128)
    return {
        "1x160x5x128x128": lambda: resnet(shape, False, device, dtype),
        "1x160x5x128x128 channels last": lambda: resnet(shape, True, device, dtype),
    }


def resnet(shape: tuple[int, ...], channels_last: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments as a residual block has them."""
    weight, bias = (draw((shape[1],), device, dtype) for _ in range(2))
    return volume(shape, channels_last, device, dtype), weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    channels = choose(SIZES)
    (x,) = random_volume(choose, channels, device, dtype, 1)
    weight, bias = (random_parameter(choose, channels, device, dtype) for _ in range(2))
    return x, weight, bias, choose((1e-6, 1e-5))


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
    out_shape=lambda x, *_: x.shape,
)


def layer_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """``y = layer_norm(x over its channels, weight, bias)``, then ``y * sigmoid(y)``; in float32 (float64 stays).

    Args:
        x: ``(batch, channels, *spatial)`` of rank 3 or more, any strides; every position is normalised on its own.
        weight, bias: ``(channels)`` in ``x``'s dtype.
        eps: added to the variance.
        out: contiguous tensor of ``x``'s shape and dtype to write into (no autograd).

    Returns:
        Tensor of ``x``'s shape and dtype, in ``x``'s memory format where that is ``channels_last`` or
        ``channels_last_3d``, else contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    args = (x, weight, bias, eps)
    return op(*args) if out is None else op.into(out, *args)
