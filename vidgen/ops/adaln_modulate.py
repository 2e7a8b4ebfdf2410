# SPDX-License-Identifier: Apache-2.0
"""LayerNorm followed by the shift and scale of adaptive conditioning (adaLN, DiT, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import wide
from ._draw import draw
from ._modulation import check_affine, check_modulation, check_rows, chunks, per_token, random_rows
from ._registry import Choose, Cost, Op
from .adaln_modulate_backward import op as adaln_modulate_backward

SCHEMA = "adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps) -> Tensor"


def check(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_rows("adaln_modulate", x)
    check_modulation("adaln_modulate", x, shift=shift, scale=scale)
    check_affine("adaln_modulate", x, x.shape[-1], weight=weight, bias=bias)


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    weight, bias = (None if t is None else wide(t) for t in (weight, bias))
    normalised = F.layer_norm(wide(x), x.shape[-1:], weight, bias, eps)
    return (normalised * (1 + per_token(wide(scale))) + per_token(wide(shift))).to(x.dtype)


def fake(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, weight, bias, ctx.eps = inputs
    ctx.shift_per_token = shift.dim() == 3
    ctx.save_for_backward(x, scale, weight, bias)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, weight, bias = ctx.saved_tensors
    grad_x, grad_shift, grad_scale, grad_weight, grad_bias = adaln_modulate_backward(
        grad, x, scale, weight, bias, ctx.eps
    )
    grad_shift = grad if ctx.shift_per_token else grad_shift
    return (
        grad_x,
        grad_shift,
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
        block(2, 3, 70, True, device, dtype),
        (new(0, 3, 8), new(0, 8), new(0, 8), None, None, 1e-6),
        (new(2, 0, 8), new(2, 8), new(2, 8), new(8), None, 1e-6),
        (new(2, 5, 33), new(2, 5, 33), new(2, 5, 33), None, new(33), 1e-6),
        (new(2, 33, 5).transpose(1, 2), new(2, 5, 33), new(2, 33), None, None, 1e-5),
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
    x = draw((batch, sequence, channels), device, dtype)
    shift, scale, *_ = chunks(batch, channels, device, dtype)
    weight, bias = (draw((channels,), device, dtype) for _ in range(2)) if affine else (None, None)
    return x, shift, scale, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, modulation, affine = random_rows(choose, device, dtype, rows=1, modulations=2, parameters=2)
    return *x, *modulation, *affine, choose((1e-6, 1e-5))


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


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """``layer_norm(x, weight, bias) * (1 + scale) + shift``, computed in float32 (float64 stays float64).

    Args:
        x: ``(batch, sequence, channels)``, any strides.
        shift, scale: ``(batch, channels)``, or one row per token, ``(batch, sequence, channels)``;
            same dtype and device as ``x``, any strides (``chunk(6)`` views are the usual case).
        weight, bias: ``(channels)`` of the LayerNorm itself, where it is affine.
        eps: added to the variance.
        out: contiguous tensor of ``x``'s shape and dtype to write into (no autograd).

    Returns:
        Contiguous tensor of ``x``'s shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    args = (x, shift, scale, weight, bias, eps)
    return op(*args) if out is None else op.into(out, *args)
