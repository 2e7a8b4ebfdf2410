# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``adaln_modulate`` in one pass over the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import require_like
from ._draw import draw
from ._modulation import (
    adaln_gradients,
    check_affine,
    check_modulation,
    check_rows,
    chunks,
    random_rows,
    refuse_rows,
)
from ._registry import Choose, Cost, Op

SCHEMA = (
    "adaln_modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale, Tensor grad_weight, Tensor grad_bias)"
)


def check(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_rows("adaln_modulate_backward", x)
    require_like("adaln_modulate_backward", "grad", grad, tuple(x.shape), x)
    check_modulation("adaln_modulate_backward", x, scale=scale)
    check_affine("adaln_modulate_backward", x, x.shape[-1], weight=weight, bias=bias)


def reference(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """Gradients of x, shift per sample (of a shift per token, ``grad`` is the gradient itself), scale, weight, bias.

    Those of weight and bias have no elements where the norm has no such parameter.
    """
    grad_x, *rest = adaln_gradients(grad, x, scale, weight, bias, eps)
    return grad_x.to(x.dtype), *rest


def fake(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    batch, _, channels = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, channels),
        x.new_empty(scale.shape),
        x.new_empty(0 if weight is None else channels),
        x.new_empty(0 if bias is None else channels),
    )


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        block(1, 1, 1, False, device, dtype),
        block(2, 3, 17, False, device, dtype),
        block(2, 130, 70, True, device, dtype),
        (new(0, 3, 8), new(0, 3, 8), new(0, 8), None, new(8), 1e-6),
        (new(2, 0, 8), new(2, 0, 8), new(2, 8), new(8), None, 1e-6),
        (new(2, 5, 33), new(2, 5, 33), new(2, 5, 33), new(33), None, 1e-6),
        (new(2, 5, 33), new(2, 33, 5).transpose(1, 2), new(2, 33), None, new(33), 1e-5),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        "1x4096x1536": lambda: block(1, 4096, 1536, False, device, dtype),
        "1x4096x3072 affine": lambda: block(1, 4096, 3072, True, device, dtype),
    }


def block(
    batch: int, sequence: int, channels: int, affine: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments as a DiT block has them."""
    grad, x = (draw((batch, sequence, channels), device, dtype) for _ in range(2))
    _, scale, *_ = chunks(batch, channels, device, dtype)
    weight, bias = (draw((channels,), device, dtype) for _ in range(2)) if affine else (None, None)
    return grad, x, scale, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    rows, scale, affine = random_rows(choose, device, dtype, rows=2, modulations=1, parameters=2)
    return *rows, *scale, *affine, choose((1e-6, 1e-5))


def cost(grad: Tensor, *_: Any) -> Cost:
    return Cost(bytes=3 * grad.numel() * grad.element_size())


op = Op(
    SCHEMA,
    check,
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    native_refuses=lambda grad, x, scale, *_: refuse_rows(scale),
)
