# SPDX-License-Identifier: Apache-2.0
"""Attention to two sets of keys from attention to each, as rings of ranks merge it (arXiv 2310.01889)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import describe, require_device, require_floating, require_like, wide
from ._draw import SMALL_SIZES, draw, strided
from ._registry import Choose, Cost, Op

SCHEMA = "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"


def check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    name = "merge_attention"
    require_floating(name, "out_a", out_a, 4, "(batch, queries, heads, head_dim)")
    require_like(name, "out_b", out_b, tuple(out_a.shape), out_a)
    batch, queries, heads, _ = out_a.shape
    shape, exact = (batch, heads, queries), torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for label, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(lse.shape) != shape or lse.dtype != exact:
            raise ValueError(f"{name}: {label} must be {shape} of {exact}, got {describe(lse)}")
        require_device(name, label, lse, out_a)


def reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.stack((lse_a, lse_b))
    unseen = (lse == -torch.inf).all(0)
    weights = lse.masked_fill(unseen, 0).softmax(0).transpose(2, 3).unsqueeze(-1)
    out = (weights * torch.stack((wide(out_a), wide(out_b)))).sum(0)
    return out.to(out_a.dtype), lse.masked_fill(unseen, 0).logsumexp(0).masked_fill(unseen, -torch.inf)


def composite(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    seen = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = ((part - seen).exp().transpose(1, 2).unsqueeze(-1) for part in (lse_a, lse_b))
    return (wide(out_a) * weight_a + wide(out_b) * weight_b).to(out_a.dtype), lse


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    shapes = [(1, 1, 1, 1), (2, 3, 2, 8), (1, 5, 3, 7), (2, 0, 2, 4), (0, 2, 1, 4)]
    cases = [new_args(shape, device, dtype) for shape in shapes]
    out_a, lse_a, out_b, lse_b = new_args((2, 4, 2, 8), device, dtype)
    return [*cases, (out_a.transpose(1, 2).contiguous().transpose(1, 2), lse_a + 100, out_b, lse_b - 100)]


def new_args(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    make: Callable[[tuple[int, ...], torch.device, torch.dtype], Tensor] = draw,
) -> tuple[Any, ...]:
    batch, queries, heads, _ = shape
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    lse_a, lse_b = (make((batch, heads, queries), device, exact) for _ in range(2))
    return make(shape, device, dtype), lse_a, make(shape, device, dtype), lse_b


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {"1x4096x24x128": lambda: new_args((1, 4096, 24, 128), device, dtype)}


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = choose((0, 1, 2)), choose(SMALL_SIZES), choose((1, 2, 3)), choose((1, 3, 8, 33))
    return new_args(shape, device, dtype, lambda *args: strided(choose, *args))


def cost(out_a: Tensor, *_: Any) -> Cost:
    return Cost(bytes=3 * out_a.numel() * out_a.element_size())


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, composite=composite)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both parts, exactly: parts and results are those of :func:`attention_lse`.

    With ``lse = logaddexp(lse_a, lse_b)``: ``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)``, in float32. A
    query that has seen no key in either part is 0 with log-sum-exp -inf, and stays so. Differentiable.

    Args:
        out_a, out_b: ``(batch, queries, heads, head_dim)``, one dtype, any strides.
        lse_a, lse_b: ``(batch, heads, queries)`` in float32 (float64 where ``out_a`` is).

    Returns:
        ``(out, lse)`` of the shapes and dtypes of the parts. To merge many parts keep ``out`` in float32 until the end:
        each merge rounds once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return op(out_a, lse_a, out_b, lse_b)
