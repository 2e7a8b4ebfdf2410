# SPDX-License-Identifier: Apache-2.0
"""Shift, scale and gate of adaptive conditioning: per sample ``(batch, channels)`` or per token, as ``x`` itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import require_floating, require_like, wide
from ._draw import SIZES, SMALL_SIZES, draw, strided
from ._registry import Choose, refuse_dtype


def check_rows(op: str, x: Tensor) -> None:
    require_floating(op, "x", x, 3, "(batch, sequence, channels)")


def check_modulation(op: str, x: Tensor, **modulation: Tensor) -> None:
    """Each of ``modulation`` must be per sample or per token, in ``x``'s dtype."""
    batch, sequence, channels = x.shape
    for name, t in modulation.items():
        if t.dim() == 3:
            require_like(op, name, t, (batch, sequence, channels), x)
        elif tuple(t.shape) != (batch, channels):
            wanted = f"(batch, channels) or (batch, sequence, channels) with x {tuple(x.shape)}"
            raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(t.shape)}")
        else:
            require_like(op, name, t, (batch, channels), x)


def check_affine(op: str, x: Tensor, channels: int, **affine: Tensor | None) -> None:
    """Each of ``affine`` must be None or ``(channels)`` in ``x``'s dtype."""
    for name, t in affine.items():
        if t is not None:
            require_like(op, name, t, (channels,), x)


def refuse_rows(*modulation: Tensor) -> str | None:
    """What the kernels of gradients say to modulations per token, whose gradients are as large as the activations."""
    if any(t.dim() == 3 for t in modulation):
        return "the kernel takes modulations per sample, not per token"
    return refuse_dtype(*modulation)


def per_token(t: Tensor) -> Tensor:
    """``(batch, channels)`` as ``(batch, 1, channels)``; per-token modulation unchanged."""
    return t.unsqueeze(1) if t.dim() == 2 else t


def summed_like(grad: Tensor, modulation: Tensor) -> Tensor:
    """The gradient of a modulation from that of its value at each token."""
    return (grad.sum(1) if modulation.dim() == 2 else grad).to(modulation.dtype)


def adaln_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of ``adaln_modulate``: gradients of x (not rounded yet), shift per sample, scale, weight and bias.

    Those of weight and bias have no elements where the norm has no such parameter.
    """
    grad, x_w, gain = wide(grad), wide(x), 1 + per_token(wide(scale))
    centred = x_w - x_w.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    affine = normalised if weight is None else normalised * wide(weight)
    affine = affine if bias is None else affine + wide(bias)
    inner = grad * gain
    grad_weight = x.new_empty(0) if weight is None else (inner * normalised).sum((0, 1)).to(weight.dtype)
    grad_bias = x.new_empty(0) if bias is None else inner.sum((0, 1)).to(bias.dtype)
    inner = inner if weight is None else inner * wide(weight)
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normalised * (inner * normalised).mean(-1, keepdim=True))
    return grad_x, grad.sum(1).to(x.dtype), summed_like(grad * affine, scale), grad_weight, grad_bias


def chunks(batch: int, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Six modulations as a DiT block has them: strided views of one projection."""
    return draw((batch, 6 * channels), device, dtype).chunk(6, dim=-1)


def random_rows(
    choose: Choose,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    modulations: int,
    parameters: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Activations, modulations in either form, and parameters that may be None."""
    batch, sequence, channels = choose(SMALL_SIZES), choose(SMALL_SIZES), choose(SIZES)
    forms = ((batch, channels), (batch, sequence, channels))
    return (
        [strided(choose, (batch, sequence, channels), device, dtype) for _ in range(rows)],
        [strided(choose, choose(forms), device, dtype) for _ in range(modulations)],
        [strided(choose, (channels,), device, dtype) if choose((True, False)) else None for _ in range(parameters)],
    )
