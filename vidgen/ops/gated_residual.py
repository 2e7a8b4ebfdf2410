# SPDX-License-Identifier: Apache-2.0
"""Residual connection whose branch is scaled by a gate of adaptive conditioning (adaLN-Zero, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import require_like, wide
from ._draw import draw
from ._modulation import check_modulation, check_rows, chunks, per_token, random_rows
from ._registry import Choose, Cost, Op
from .gated_residual_backward import op as gated_residual_backward

SCHEMA = "gated_residual(Tensor x, Tensor gate, Tensor y) -> Tensor"


def check(x: Tensor, gate: Tensor, y: Tensor) -> None:
    check_rows("gated_residual", x)
    check_modulation("gated_residual", x, gate=gate)
    require_like("gated_residual", "y", y, tuple(x.shape), x)


def reference(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return (wide(x) + per_token(wide(gate)) * wide(y)).to(x.dtype).contiguous()


def fake(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, gate, y = inputs
    ctx.save_for_backward(gate, y)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, y = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:]):
        return grad, None, None
    return grad, *gated_residual_backward(grad, gate, y)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        block(1, 1, 1, device, dtype),
        block(2, 3, 70, device, dtype),
        (new(0, 3, 8), new(0, 8), new(0, 3, 8)),
        (new(2, 0, 8), new(2, 0, 8), new(2, 0, 8)),
        (new(2, 5, 33), new(2, 5, 33), new(2, 5, 33)),
        (new(2, 33, 5).transpose(1, 2), new(2, 33), new(2, 5, 66)[..., ::2]),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        "1x4096x1536": lambda: block(1, 4096, 1536, device, dtype),
        "1x4096x3072": lambda: block(1, 4096, 3072, device, dtype),
    }


def block(batch: int, sequence: int, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments as a DiT block has them."""
    x, y = (draw((batch, sequence, channels), device, dtype) for _ in range(2))
    return x, chunks(batch, channels, device, dtype)[2], y


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    (x, y), (gate,), _ = random_rows(choose, device, dtype, rows=2, modulations=1)
    return x, gate, y


def cost(x: Tensor, *_: Any) -> Cost:
    return Cost(bytes=3 * x.numel() * x.element_size())


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


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``x + gate * y``, computed in float32 and rounded once (float64 stays float64).

    Args:
        x: the residual stream ``(batch, sequence, channels)``, any strides.
        gate: ``(batch, channels)``, or one row per token, ``(batch, sequence, channels)``.
        y: what the branch computed, of ``x``'s shape. All share ``x``'s dtype and device, any strides.
        out: contiguous tensor of ``x``'s shape and dtype to write into (no autograd).

    Returns:
        Contiguous tensor of ``x``'s shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return op(x, gate, y) if out is None else op.into(out, x, gate, y)
