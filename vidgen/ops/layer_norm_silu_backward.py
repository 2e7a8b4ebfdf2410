# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``layer_norm_silu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import wide
from ._draw import SIZES, draw
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
    "layer_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def check(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_volume("layer_norm_silu_backward", x, weight, bias)
    check_gradient("layer_norm_silu_backward", grad, x)


def reference(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    centred = wide(x) - wide(x).mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    inner, grad_weight, grad_bias = silu_affine_gradients(grad, normalised, weight, bias, x)
    grad_x = rstd * (inner - inner.mean(1, keepdim=True) - normalised * (inner * normalised).mean(1, keepdim=True))
    return rounded_like(grad_x, x), grad_weight, grad_bias


def fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(x), x.new_empty(weight.shape), x.new_empty(bias.shape)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 1), new(1, 1, 1), new(1), new(1), 1e-6),
        resnet((2, 6, 3, 5, 7), False, device, dtype),
        resnet((2, 6, 3, 5, 7), True, device, dtype),
        resnet((1, 70, 9, 9), True, device, dtype),
        resnet((2, 3, 600), False, device, dtype),
        (new(0, 4, 3), new(0, 4, 3), new(4), new(4), 1e-6),
        (new(2, 4, 0, 3), new(2, 4, 0, 3), new(4), new(4), 1e-6),
        (new(2, 6, 70), new(2, 70, 6).transpose(1, 2), new(6), new(6), 1e-5),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    shape = (1, 160, 5, 128, 128)
    return {
        "1x160x5x128x128": lambda: resnet(shape, False, device, dtype),
        "1x160x5x128x128 channels last": lambda: resnet(shape, True, device, dtype),
    }


def resnet(shape: tuple[int, ...], channels_last: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments as a residual block has them."""
    grad, x = (volume(shape, channels_last, device, dtype) for _ in range(2))
    weight, bias = (draw((shape[1],), device, dtype) for _ in range(2))
    return grad, x, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    channels = choose(SIZES)
    grad, x = random_volume(choose, channels, device, dtype, 2)
    weight, bias = (random_parameter(choose, channels, device, dtype) for _ in range(2))
    return grad, x, weight, bias, choose((1e-6, 1e-5))


def cost(grad: Tensor, *_: Any) -> Cost:
    return Cost(bytes=3 * grad.numel() * grad.element_size())


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, fake=fake)
