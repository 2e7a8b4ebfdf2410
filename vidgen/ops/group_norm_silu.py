# SPDX-License-Identifier: Apache-2.0
"""GroupNorm followed by SiLU, as the residual blocks of convolutional autoencoders use them (arXiv 1803.08494)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import wide
from ._draw import draw
from ._norm_silu import check_volume, empty_like, per_channel, random_parameter, random_volume, rounded_like, volume
from ._registry import Choose, Cost, Op
from .group_norm_silu_backward import check_groups
from .group_norm_silu_backward import op as group_norm_silu_backward

SCHEMA = "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor"


def check(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_volume("group_norm_silu", x, weight, bias)
    check_groups("group_norm_silu", x, num_groups)


def reference(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    groups = wide(x).unflatten(1, (num_groups, x.shape[1] // num_groups)).flatten(2)
    y = F.layer_norm(groups, groups.shape[-1:], eps=eps).view(x.shape)
    y = y if weight is None else y * per_channel(weight, x.dim())
    y = y if bias is None else y + per_channel(bias, x.dim())
    return rounded_like(F.silu(y), x)


def fake(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return empty_like(x)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = group_norm_silu_backward(grad, x, ctx.num_groups, weight, bias, ctx.eps)
    return grad_x, None, None if weight is None else grad_weight, None if bias is None else grad_bias, None


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 1), 1, None, None, 1e-6),
        resnet((2, 6, 2, 3, 5), 3, False, device, dtype),
        resnet((2, 6, 2, 3, 5), 3, True, device, dtype),
        resnet((1, 64, 2, 2), 32, True, device, dtype),
        (new(0, 4, 3), 2, new(4), None, 1e-6),
        (new(2, 4, 0, 3), 2, None, new(4), 1e-6),
        (new(2, 7, 6).transpose(1, 2), 2, None, new(6), 1e-5),
        (new(1, 2, 100), 1, new(2), None, 1e-6),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    shape = (1, 128, 5, 128, 128)
    return {
        "1x128x5x128x128": lambda: resnet(shape, 32, False, device, dtype),
        "1x128x5x128x128 channels last": lambda: resnet(shape, 32, True, device, dtype),
    }


def resnet(
    shape: tuple[int, ...], num_groups: int, channels_last: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments as a residual block has them."""
    weight, bias = (draw((shape[1],), device, dtype) for _ in range(2))
    return volume(shape, channels_last, device, dtype), num_groups, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    num_groups = choose((1, 2, 3, 4))
    channels = num_groups * choose((0, 1, 2, 3, 16, 17, 33))
    (x,) = random_volume(choose, channels, device, dtype, 1)
    weight, bias = (random_parameter(choose, channels, device, dtype) if choose((True, False)) else None for _ in "wb")
    return x, num_groups, weight, bias, choose((1e-6, 1e-5))


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


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """``y = group_norm(x, num_groups, weight, bias)``, then ``y * sigmoid(y)``; in float32 (float64 stays float64).

    Args:
        x: ``(batch, channels, *spatial)`` of rank 3 or more, any strides.
        num_groups: divides ``channels``; each group is normalised over its channels and all positions.
        weight, bias: ``(channels)`` in ``x``'s dtype, where the norm is affine.
        eps: added to the variance.
        out: contiguous tensor of ``x``'s shape and dtype to write into (no autograd).

    Returns:
        Tensor of ``x``'s shape and dtype, in ``x``'s memory format where that is ``channels_last`` or
        ``channels_last_3d``, else contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``num_groups`` does not divide the channels.
    """
    args = (x, num_groups, weight, bias, eps)
    return op(*args) if out is None else op.into(out, *args)
