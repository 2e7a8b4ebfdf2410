# SPDX-License-Identifier: Apache-2.0
"""A gated residual connection and the modulated LayerNorm that follows it in a DiT block, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import require_like
from ._draw import draw
from ._modulation import check_affine, check_modulation, check_rows, chunks, random_rows
from ._registry import Choose, Cost, Op
from .adaln_modulate import reference as adaln_modulate
from .gated_residual import reference as gated_residual
from .gated_residual_adaln_backward import op as gated_residual_adaln_backward

SCHEMA = (
    "gated_residual_adaln(Tensor x, Tensor gate, Tensor y, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias,"
    " float eps) -> (Tensor h, Tensor modulated)"
)


def check(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    check_rows("gated_residual_adaln", x)
    check_modulation("gated_residual_adaln", x, gate=gate, shift=shift, scale=scale)
    require_like("gated_residual_adaln", "y", y, tuple(x.shape), x)
    check_affine("gated_residual_adaln", x, x.shape[-1], weight=weight, bias=bias)


def reference(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    h = gated_residual(x, gate, y)
    return h, adaln_modulate(h, shift, scale, weight, bias, eps)


def fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gate, y, shift, scale, weight, bias, ctx.eps = inputs
    ctx.shift_per_token = shift.dim() == 3
    ctx.save_for_backward(output[0], gate, y, scale, weight, bias)


def backward(ctx: Any, grad_h: Tensor, grad_modulated: Tensor) -> tuple[Tensor | None, ...]:
    h, gate, y, scale, weight, bias = ctx.saved_tensors
    grad_x, grad_gate, grad_y, grad_shift, grad_scale, grad_weight, grad_bias = gated_residual_adaln_backward(
        grad_h, grad_modulated, h, gate, y, scale, weight, bias, ctx.eps
    )
    return (
        grad_x,
        grad_gate,
        grad_y,
        grad_modulated if ctx.shift_per_token else grad_shift,
        grad_scale,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None,
    )


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        block(1, 1, 1, False, device, dtype),
        block(2, 3, 17, False, device, dtype),
        block(2, 2, 35, True, device, dtype),
        (new(0, 3, 8), new(0, 8), new(0, 3, 8), new(0, 8), new(0, 8), None, None, 1e-6),
        (new(2, 0, 8), new(2, 8), new(2, 0, 8), new(2, 8), new(2, 8), new(8), None, 1e-6),
        (new(2, 5, 33), new(2, 5, 33), new(2, 5, 33), new(2, 5, 33), new(2, 5, 33), None, new(33), 1e-6),
        (new(2, 33, 5).transpose(1, 2), new(2, 33), new(2, 5, 33), new(2, 5, 33), new(2, 33), None, None, 1e-5),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        "1x4096x1536": lambda: block(1, 4096, 1536, False, device, dtype),
        "1x4096x3072": lambda: block(1, 4096, 3072, False, device, dtype),
        "1x4096x3072 affine": lambda: block(1, 4096, 3072, True, device, dtype),
    }


def block(
    batch: int, sequence: int, channels: int, affine: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments as a DiT block has them."""
    x, y = (draw((batch, sequence, channels), device, dtype) for _ in range(2))
    _, _, gate, shift, scale, _ = chunks(batch, channels, device, dtype)
    weight, bias = (draw((channels,), device, dtype) for _ in range(2)) if affine else (None, None)
    return x, gate, y, shift, scale, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    (x, y), (gate, shift, scale), affine = random_rows(choose, device, dtype, rows=2, modulations=3, parameters=2)
    return x, gate, y, shift, scale, *affine, choose((1e-6, 1e-5))


def cost(x: Tensor, *_: Any) -> Cost:
    return Cost(bytes=4 * x.numel() * x.element_size())


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, fake=fake, save=save, backward=backward)


def gated_residual_adaln(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``h = x + gate * y`` and ``layer_norm(h, weight, bias) * (1 + scale) + shift``, both.

    ``h`` is rounded to ``x``'s dtype before its statistics are taken, so the pair is that of ``gated_residual``
    followed by ``adaln_modulate``, to the bit.

    Args:
        x: the residual stream ``(batch, sequence, channels)``, any strides.
        gate, shift, scale: ``(batch, channels)``, or one row per token, ``(batch, sequence, channels)``.
        y: what the branch computed, of ``x``'s shape. All tensors share ``x``'s dtype and device, any strides.
        weight, bias: ``(channels)`` of the LayerNorm itself, where it is affine.
        eps: added to the variance.

    Returns:
        ``(h, modulated)``, contiguous, of ``x``'s shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return op(x, gate, y, shift, scale, weight, bias, eps)
