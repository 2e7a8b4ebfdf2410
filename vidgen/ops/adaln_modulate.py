# SPDX-License-Identifier: Apache-2.0
"""LayerNorm followed by the shift and scale of adaptive conditioning (adaLN, DiT, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import require_floating, require_like, wide
from ._draw import SIZES, SMALL_SIZES, draw, strided
from ._registry import Choose, Cost, Op

SCHEMA = "adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps) -> Tensor"


def check(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    require_floating("adaln_modulate", "x", x, 3, "(batch, sequence, channels)")
    check_modulation("adaln_modulate", x, shift=shift, scale=scale)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            require_like("adaln_modulate", name, t, (x.shape[-1],), x)


def check_modulation(op: str, x: Tensor, **modulation: Tensor) -> None:
    """Each of ``modulation`` must be per sample or per token, in ``x``'s dtype."""
    batch, sequence, channels = x.shape
    for name, t in modulation.items():
        if t.dim() == 3:
            require_like(op, name, t, (batch, sequence, channels), x)
        else:
            require_like(op, name, t, (batch, channels), x)


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    weight, bias = (None if t is None else wide(t) for t in (weight, bias))
    normalised = F.layer_norm(wide(x), x.shape[-1:], weight, bias, eps)
    return (normalised * (1 + per_token(wide(scale))) + per_token(wide(shift))).to(x.dtype)


def fake(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, scale, weight, bias)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, weight, bias = ctx.saved_tensors
    return (*adaln_backward(grad, x, scale, weight, bias, ctx.eps), None)


def adaln_backward(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of x, shift, scale, weight and bias."""
    grad_w, x_w, gain = wide(grad), wide(x), 1 + per_token(wide(scale))
    centred = x_w - x_w.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = centred * rstd
    affine = normalised if weight is None else normalised * wide(weight)
    affine = affine if bias is None else affine + wide(bias)

    def like_scale(t: Tensor) -> Tensor:
        return (t.sum(1) if scale.dim() == 2 else t).to(scale.dtype)

    inner = grad_w * gain
    grad_weight = None if weight is None else (inner * normalised).sum((0, 1)).to(weight.dtype)
    grad_bias = None if bias is None else inner.sum((0, 1)).to(bias.dtype)
    inner = inner if weight is None else inner * wide(weight)
    grad_x = rstd * (inner - inner.mean(-1, keepdim=True) - normalised * (inner * normalised).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), like_scale(grad_w), like_scale(grad_w * affine), grad_weight, grad_bias


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
        (new(2, 33, 5).transpose(1, 2), new(2, 33), new(2, 33), None, None, 1e-5),
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
    """Arguments as a DiT block has them: the modulation is a strided view, six chunks of one projection."""
    x = draw((batch, sequence, channels), device, dtype)
    shift, scale, *_ = draw((batch, 6 * channels), device, dtype).chunk(6, dim=-1)
    weight, bias = (draw((channels,), device, dtype) for _ in range(2)) if affine else (None, None)
    return x, shift, scale, weight, bias, 1e-6


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, sequence, channels = choose(SMALL_SIZES), choose(SMALL_SIZES), choose(SIZES)

    def modulation() -> Tensor:
        shape = choose(((batch, channels), (batch, sequence, channels)))
        return strided(choose, shape, device, dtype)

    def affine() -> Tensor | None:
        return strided(choose, (channels,), device, dtype) if choose((True, False)) else None

    x = strided(choose, (batch, sequence, channels), device, dtype)
    return x, modulation(), modulation(), affine(), affine(), choose((1e-6, 1e-5))


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


def per_token(t: Tensor) -> Tensor:
    """``(batch, channels)`` as ``(batch, 1, channels)``; per-token modulation unchanged."""
    return t.unsqueeze(1) if t.dim() == 2 else t
