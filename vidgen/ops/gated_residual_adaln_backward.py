# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``gated_residual_adaln``, through both of its results, in one pass over the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import require_like, wide
from ._draw import draw
from ._modulation import (
    adaln_gradients,
    check_affine,
    check_modulation,
    check_rows,
    chunks,
    per_token,
    random_rows,
    refuse_rows,
    summed_like,
)
from ._registry import Choose, Cost, Op

SCHEMA = (
    "gated_residual_adaln_backward(Tensor grad_h, Tensor grad_modulated, Tensor h, Tensor gate, Tensor y, Tensor scale,"
    " Tensor? weight, Tensor? bias, float eps) -> (Tensor grad_x, Tensor grad_gate, Tensor grad_y, Tensor grad_shift,"
    " Tensor grad_scale, Tensor grad_weight, Tensor grad_bias)"
)


def check(
    grad_h: Tensor,
    grad_modulated: Tensor,
    h: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    name = "gated_residual_adaln_backward"
    check_rows(name, h)
    for argument, t in (("grad_h", grad_h), ("grad_modulated", grad_modulated), ("y", y)):
        require_like(name, argument, t, tuple(h.shape), h)
    check_modulation(name, h, gate=gate, scale=scale)
    check_affine(name, h, h.shape[-1], weight=weight, bias=bias)


def reference(
    grad_h: Tensor,
    grad_modulated: Tensor,
    h: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of x, gate, y, shift per sample (of a shift per token it is ``grad_modulated``), scale, weight, bias.

    Those of weight and bias have no elements where the norm has no such parameter.
    """
    through_norm, *rest = adaln_gradients(grad_modulated, h, scale, weight, bias, eps)
    grad = wide(grad_h) + through_norm
    grad_gate = summed_like(grad * wide(y), gate)
    grad_y = grad * per_token(wide(gate))
    return grad.to(h.dtype).contiguous(), grad_gate.contiguous(), grad_y.to(h.dtype).contiguous(), *rest


def fake(
    grad_h: Tensor,
    grad_modulated: Tensor,
    h: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    batch, _, channels = h.shape
    return (
        h.new_empty(h.shape),
        h.new_empty(gate.shape),
        h.new_empty(h.shape),
        h.new_empty(batch, channels),
        h.new_empty(scale.shape),
        h.new_empty(0 if weight is None else channels),
        h.new_empty(0 if bias is None else channels),
    )


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    def rows(*shape: int) -> tuple[Tensor, ...]:
        return new(*shape), new(*shape), new(*shape)

    return [
        block(1, 1, 1, False, device, dtype),
        block(2, 3, 17, False, device, dtype),
        block(2, 130, 70, True, device, dtype),
        (*rows(0, 3, 8), new(0, 8), new(0, 3, 8), new(0, 8), None, new(8), 1e-6),
        (*rows(2, 0, 8), new(2, 8), new(2, 0, 8), new(2, 8), new(8), None, 1e-6),
        (*rows(2, 5, 33), new(2, 5, 33), new(2, 5, 33), new(2, 33), None, new(33), 1e-6),
        (*rows(2, 5, 33), new(2, 33), new(2, 33, 5).transpose(1, 2), new(2, 5, 33), None, None, 1e-5),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {"1x4096x1536 affine": lambda: block(1, 4096, 1536, True, device, dtype)}


def block(
    batch: int, sequence: int, channels: int, affine: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments as a DiT block has them."""
    grad_h, grad_modulated, h, y = (draw((batch, sequence, channels), device, dtype) for _ in range(4))
    _, _, gate, _, scale, _ = chunks(batch, channels, device, dtype)
    weight, bias = (draw((channels,), device, dtype) for _ in range(2)) if affine else (None, None)
    return grad_h, grad_modulated, h, gate, y, scale, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    (*rows, y), (gate, scale), affine = random_rows(choose, device, dtype, rows=4, modulations=2, parameters=2)
    return *rows, gate, y, scale, *affine, choose((1e-6, 1e-5))


def cost(grad_h: Tensor, *_: Any) -> Cost:
    return Cost(bytes=6 * grad_h.numel() * grad_h.element_size())


op = Op(
    SCHEMA,
    check,
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    native_refuses=lambda grad_h, grad_modulated, h, gate, y, scale, *_: refuse_rows(gate, scale),
)
