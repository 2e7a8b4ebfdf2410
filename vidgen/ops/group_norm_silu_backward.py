# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``group_norm_silu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import wide
from ._draw import draw
from ._norm_silu import (
    check_gradient,
    check_volume,
    empty_like,
    random_parameter,
    random_volume,
    rounded_like,
    silu_affine_gradients,
    volume,
)
from ._registry import Choose, Cost, Op

SCHEMA = (
    "group_norm_silu_backward(Tensor grad, Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def check(grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_volume("group_norm_silu_backward", x, weight, bias)
    check_gradient("group_norm_silu_backward", grad, x)
    check_groups("group_norm_silu_backward", x, num_groups)


def check_groups(op: str, x: Tensor, num_groups: int) -> None:
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {x.shape[1]} channels, got {num_groups}")


def reference(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the last two have no elements where there is no such parameter."""

    def grouped(t: Tensor) -> Tensor:
        return t.unflatten(1, (num_groups, x.shape[1] // num_groups))

    within = tuple(range(2, x.dim() + 1))
    centred = grouped(wide(x)) - grouped(wide(x)).mean(within, keepdim=True)
    rstd = (centred.square().mean(within, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    inner, grad_weight, grad_bias = silu_affine_gradients(grad, normalised.flatten(1, 2), weight, bias, x)
    inner = grouped(inner)
    through_mean, through_rstd = (t.mean(within, keepdim=True) for t in (inner, inner * normalised))
    grad_x = rstd * (inner - through_mean - normalised * through_rstd)
    return rounded_like(grad_x.flatten(1, 2), x), grad_weight, grad_bias


def fake(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    return empty_like(x), x.new_empty(0 if weight is None else channels), x.new_empty(0 if bias is None else channels)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 1), new(1, 1, 1), 1, None, None, 1e-6),
        resnet((2, 6, 3, 5, 7), 3, False, device, dtype),
        resnet((2, 6, 3, 5, 7), 3, True, device, dtype),
        resnet((2, 64, 9, 9), 32, True, device, dtype),
        (new(0, 4, 3), new(0, 4, 3), 2, new(4), None, 1e-6),
        (new(2, 4, 0, 3), new(2, 4, 0, 3), 2, None, new(4), 1e-6),
        (new(2, 6, 70), new(2, 70, 6).transpose(1, 2), 2, None, new(6), 1e-5),
        (new(1, 2, 5000), new(1, 2, 5000), 1, new(2), None, 1e-6),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {"1x128x5x128x128": lambda: resnet((1, 128, 5, 128, 128), 32, False, device, dtype)}


def resnet(
    shape: tuple[int, ...], num_groups: int, channels_last: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments as a residual block has them."""
    grad, x = (volume(shape, channels_last, device, dtype) for _ in range(2))
    weight, bias = (draw((shape[1],), device, dtype) for _ in range(2))
    return grad, x, num_groups, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    num_groups = choose((1, 2, 3, 4))
    channels = num_groups * choose((0, 1, 2, 3, 16, 17, 33))
    grad, x = random_volume(choose, channels, device, dtype, 2)
    weight, bias = (random_parameter(choose, channels, device, dtype) if choose((True, False)) else None for _ in "wb")
    return grad, x, num_groups, weight, bias, choose((1e-6, 1e-5))


def cost(grad: Tensor, *_: Any) -> Cost:
    return Cost(bytes=3 * grad.numel() * grad.element_size())


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, fake=fake)
