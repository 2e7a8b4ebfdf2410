# SPDX-License-Identifier: Apache-2.0
"""The share that one set of keys has in the gradient of attention to more keys than these, as a ring of ranks adds
it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import describe, require_device, require_like, wide
from ._draw import draw
from ._registry import Backend, Choose, Cost, Op
from .attention import check_qkv, per_head, reference_lse, softmax_scale
from .attention import random_args as random_attention
from .attention import samples_lse as attention_samples

SCHEMA = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, float? scale)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)
QUERIES = 1024  # at a time: memory stays linear in the sequence

Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, float | None]


def check(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> None:
    """``mask`` is over keys, ``(batch, keys)``: rings know no other."""
    name = "attention_backward"
    check_qkv(name, q, k, v)
    batch, queries, heads, _ = q.shape
    for label, t in (("grad", grad), ("out", out)):
        require_like(name, label, t, tuple(q.shape), q)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if tuple(lse.shape) != (batch, heads, queries) or lse.dtype != exact:
        raise ValueError(f"{name}: lse must be {(batch, heads, queries)} of {exact}, got {describe(lse)}")
    require_device(name, "lse", lse, q)
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch, k.shape[1]):
            raise ValueError(f"{name}: mask must be {(batch, k.shape[1])} of bool, got {describe(mask)}")
        require_device(name, "mask", mask, q)


def reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32, to be summed over all keys.

    ``out`` and ``lse`` are those of *all* keys, so that ``P = exp(S - lse)`` are the final weights of these and
    ``dS = P * (dP - rowsum(grad * out))``: nothing has to be merged.
    """
    grad, q, k, v, out = (wide(t) for t in (grad, q, k, v, out))
    factor = softmax_scale(q, scale)
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    delta = (grad * out).sum(-1).transpose(1, 2)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing weighs nothing
    for a in range(0, q.shape[1], QUERIES):
        rows = slice(a, a + QUERIES)
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k) * factor
        if mask is not None:
            scores = scores.masked_fill(~per_head(mask), -torch.inf)
        weights = (scores - shift[..., rows, None]).exp()
        grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad[:, rows], v)
        grad_scores = weights * (grad_weights - delta[..., rows, None]) * factor
        grad_q[:, rows] = torch.einsum("bhqk,bkhd->bqhd", grad_scores, k)
        grad_k += torch.einsum("bhqk,bqhd->bkhd", grad_scores, q[:, rows])
        grad_v += torch.einsum("bhqk,bqhd->bkhd", weights, grad[:, rows])
    return grad_q, grad_k, grad_v


def fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return tuple(t.new_empty(t.shape, dtype=exact) for t in (q, k, v))


def flash_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own CPU kernel."""
    # It takes head_dim to have stride 1 and does not look: other strides give wrong gradients without a word.
    heads_first = [(t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in (grad, q, k, v, out)]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, lse, 0.0, False, scale=softmax_scale(q, scale)
    )
    grad_q, grad_k, grad_v = (t.transpose(1, 2).contiguous() for t in grads)
    return grad_q, grad_k, grad_v


def flash_cpu_refuses(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> str | None:
    if mask is not None:
        return "it takes no mask"  # nor, then, rows that see no key
    if q.dtype != torch.float32:
        return f"it is for float32, not {str(q.dtype).removeprefix('torch.')}"
    return "a size is 0" if 0 in (*q.shape, *k.shape) else None


def from_forward(args: tuple[Any, ...], whole: Callable[[Tensor], Tensor] = lambda t: t) -> Args:
    """From the arguments of attention, whose keys may be only a part: of ``whole(k)`` and ``whole(v)``."""
    q, k, v, mask, scale = args
    more = whole(k)
    everything = torch.ones(more.shape[:2], dtype=torch.bool, device=q.device)
    if mask is not None:
        everything[:, : k.shape[1]] = mask
    out, lse = reference_lse(q, more, whole(v), everything, scale)
    return torch.randn_like(out), q, k, v, out, lse, mask, scale


def samples(device: torch.device, dtype: torch.dtype) -> list[Args]:
    return [from_forward(args) for args in attention_samples(device, dtype) if over_keys(args[3])]


def over_keys(mask: Tensor | None) -> bool:
    return mask is None or mask.dim() == 2


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    def new() -> tuple[Any, ...]:
        return from_forward((*(draw((1, 1024, 12, 64), device, dtype) for _ in range(3)), None, None))

    return {"1x1024x12x64": new}


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v, mask, scale = random_attention(choose, device, dtype)
    more = choose((0, 1, 9))

    def whole(t: Tensor) -> Tensor:
        return torch.cat((t, draw((t.shape[0], more, *t.shape[2:]), device, dtype)), 1)

    return from_forward((q, k, v, mask if over_keys(mask) else None, scale), whole)


def cost(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> Cost:
    batch, queries, heads, dim = q.shape
    moved = (4 * q.numel() + 4 * k.numel()) * q.element_size()
    return Cost(bytes=moved, flops=10 * batch * heads * queries * k.shape[1] * dim)


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, fake=fake)
op.add_backend("cpu", Backend("flash_cpu", flash_cpu, flash_cpu_refuses))
