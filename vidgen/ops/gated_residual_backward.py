# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``gated_residual`` (that of x is the incoming one)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import require_like, wide
from ._draw import draw
from ._modulation import (
    check_modulation,
    check_rows,
    chunks,
    per_token,
    random_rows,
    refuse_rows,
    summed_like,
)
from ._registry import Choose, Cost, Op

SCHEMA = "gated_residual_backward(Tensor grad, Tensor gate, Tensor y) -> (Tensor grad_gate, Tensor grad_y)"


def check(grad: Tensor, gate: Tensor, y: Tensor) -> None:
    check_rows("gated_residual_backward", y)
    require_like("gated_residual_backward", "grad", grad, tuple(y.shape), y)
    check_modulation("gated_residual_backward", y, gate=gate)


def reference(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    grad_w = wide(grad)
    grad_y = (grad_w * per_token(wide(gate))).to(y.dtype)
    return summed_like(grad_w * wide(y), gate).contiguous(), grad_y.contiguous()


def fake(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(gate.shape), y.new_empty(y.shape)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        block(1, 1, 1, device, dtype),
        block(2, 130, 70, device, dtype),
        (new(0, 3, 8), new(0, 8), new(0, 3, 8)),
        (new(2, 0, 8), new(2, 8), new(2, 0, 8)),
        (new(2, 5, 33), new(2, 5, 33), new(2, 5, 33)),
        (new(2, 33, 5).transpose(1, 2), new(2, 33), new(2, 5, 66)[..., ::2]),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {"1x4096x1536": lambda: block(1, 4096, 1536, device, dtype)}


def block(batch: int, sequence: int, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments as a DiT block has them."""
    grad, y = (draw((batch, sequence, channels), device, dtype) for _ in range(2))
    return grad, chunks(batch, channels, device, dtype)[2], y


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    (grad, y), (gate,), _ = random_rows(choose, device, dtype, rows=2, modulations=1)
    return grad, gate, y


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
    native_refuses=lambda grad, gate, y: refuse_rows(gate),
)
