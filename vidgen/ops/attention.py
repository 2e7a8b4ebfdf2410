# SPDX-License-Identifier: Apache-2.0
"""Dense softmax attention, optionally with the log-sum-exp that lets partial results be merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import describe, require_device, require_floating, wide
from ._draw import SMALL_SIZES, draw, strided
from ._registry import Backend, Choose, Cost, Op

LAYOUT = "(batch, sequence, heads, head_dim)"


def checker(op: str) -> Callable[..., None]:
    def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> None:
        check_qkv(op, q, k, v)
        if mask is None:
            return
        batch, queries, heads, _ = q.shape
        keys = k.shape[1]
        forms = {2: (batch, keys), 3: (batch, queries, keys), 4: (batch, heads, queries, keys)}
        if mask.dtype != torch.bool or tuple(mask.shape) != forms.get(mask.dim()):
            wanted = " or ".join(str(form) for form in forms.values())
            raise ValueError(f"{op}: mask must be bool of shape {wanted}, got {describe(mask)}")
        require_device(op, "mask", mask, q)

    return check


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, prefix: str = "") -> None:
    """``q`` sets batch, heads and head_dim; ``k`` and ``v`` share a length of their own."""
    require_floating(op, f"{prefix}q", q, 4, LAYOUT)
    batch, _, heads, dim = q.shape
    for name, t in (("k", k), ("v", v)):
        require_floating(op, f"{prefix}{name}", t, 4, LAYOUT)
        if (t.shape[0], *t.shape[2:]) != (batch, heads, dim) or t.dtype != q.dtype:
            wanted = f"({batch}, keys, {heads}, {dim}) of {q.dtype}"
            raise ValueError(f"{op}: {prefix}{name} must be {wanted}, got {describe(t)}")
        require_device(op, f"{prefix}{name}", t, q)
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{op}: {prefix}k and {prefix}v must have one length, got {k.shape[1]} and {v.shape[1]}")


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    return reference_lse(q, k, v, mask, scale)[0]


def reference_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    scores, hidden = masked_scores(q, k, mask, scale)
    weights = scores.softmax(-1)
    lse = scores.logsumexp(-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)
        lse = lse.masked_fill(hidden.squeeze(-1), -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wide(v)).contiguous()
    return out.to(q.dtype), lse


def masked_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor | None]:
    """Scores (batch, heads, queries, keys), and which rows see no key: those score 0 to keep gradients finite."""
    scores = torch.einsum("bqhd,bkhd->bhqk", wide(q), wide(k)) * softmax_scale(q, scale)
    if mask is None:
        return scores, None
    allowed = per_head(mask)
    hidden = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(hidden, 0)
    return scores, hidden.expand(*scores.shape[:-1], 1)


def per_head(mask: Tensor) -> Tensor:
    """Any mask as a view that broadcasts to (batch, heads, queries, keys)."""
    if mask.dim() == 2:
        return mask[:, None, None, :]
    return mask[:, None] if mask.dim() == 3 else mask


def softmax_scale(q: Tensor, scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if scale is None else scale


def composite(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if k.shape[1] == 0:  # no library's kernel is asked to attend to nothing; Ascend's is documented not to
        return reference(q, k, v, mask, scale)
    q, k, v = (aligned(t).transpose(1, 2) for t in (q, k, v))
    allowed = None if mask is None else per_head(mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=softmax_scale(q, scale))
    return out.transpose(1, 2)


def aligned(t: Tensor) -> Tensor:
    """``t``, or on accelerators a copy if a head does not lie in one run that begins on 16 bytes.

    PyTorch's memory-efficient kernels read so many at once there. They look at some of the strides alone: other views
    end the process on a misaligned address, or find no kernel.
    """
    if t.device.type == "cpu":
        return t
    places = (t.storage_offset(), *t.stride()[:-1])
    if t.stride(-1) == 1 and all(place * t.element_size() % 16 == 0 for place in places):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def qkv(batch: int, queries: int, keys: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        q = draw((batch, queries, heads, dim), device, dtype)
        k, v = (draw((batch, keys, heads, dim), device, dtype) for _ in range(2))
        return q, k, v

    def mask(*shape: int) -> Tensor:
        """Every query sees the first key."""
        return (torch.rand(shape, device=device) < 0.7).index_fill(-1, torch.tensor(0, device=device), True)

    nothing_seen = mask(2, 5)
    nothing_seen[0] = False
    packed = draw((2, 6, 3, 2, 8), device, dtype)
    return [
        (*qkv(1, 1, 1, 1, 1), None, None),
        (*qkv(2, 3, 5, 2, 8), None, 0.3),
        (*packed.unbind(2), mask(2, 6), None),
        (*qkv(2, 3, 5, 2, 4), nothing_seen, None),
        (*qkv(2, 4, 5, 1, 4), mask(2, 4, 5), None),
        (*qkv(2, 3, 4, 2, 4), mask(2, 2, 3, 4), None),
        (*qkv(1, 2, 0, 1, 4), None, None),
        (*qkv(0, 2, 3, 1, 4), None, None),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    def new(sequence: int, heads: int, dim: int) -> tuple[Any, ...]:
        return (*(draw((1, sequence, heads, dim), device, dtype) for _ in range(3)), None, None)

    return {"1x4096x12x64": lambda: new(4096, 12, 64), "1x4096x12x128": lambda: new(4096, 12, 128)}


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, queries, keys = choose((1, 2, 3)), choose(SMALL_SIZES), choose((1, 2, 5, 17, 33))
    heads, dim = choose((1, 2, 3)), choose((1, 3, 8, 16, 33))
    q = strided(choose, (batch, queries, heads, dim), device, dtype)
    k, v = (strided(choose, (batch, keys, heads, dim), device, dtype) for _ in range(2))
    shape = choose((None, (batch, keys), (batch, queries, keys), (batch, heads, queries, keys)))
    mask = None if shape is None else torch.rand(shape, device=device) < 0.6
    return q, k, v, mask, choose((None, 0.5))


def cost(q: Tensor, k: Tensor, *_: Any) -> Cost:
    batch, queries, heads, dim = q.shape
    return Cost(
        bytes=2 * (q.numel() + k.numel()) * q.element_size(), flops=4 * batch * heads * queries * k.shape[1] * dim
    )


SCHEMA = "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale) -> Tensor"
op = Op(SCHEMA, checker("attention"), reference, samples, workloads, random_args, cost, composite=composite)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(q k^T * scale) v`` per sample and head, by PyTorch's ``scaled_dot_product_attention``.

    Args:
        q: ``(batch, queries, heads, head_dim)``, floating point, any strides.
        k, v: ``(batch, keys, heads, head_dim)``, like ``q``; the number of keys is free.
        mask: bool, True = attend: ``(batch, keys)`` for padding, ``(batch, queries, keys)`` or
            ``(batch, heads, queries, keys)``. A query that may attend to nothing gets 0.
        scale: default ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp, see :func:`attention_lse`.

    Returns:
        ``(batch, queries, heads, head_dim)`` in ``q``'s dtype; with ``return_lse`` the pair of it and
        the log-sum-exp.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return attention_lse(q, k, v, mask=mask, scale=scale) if return_lse else op(q, k, v, mask, scale)


# With the log-sum-exp. PyTorch's own kernel returns it too but gives it no gradient, so this is an op of its own.


def fake_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((batch, heads, queries), dtype=lse_dtype, device=q.device)


def save_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def backward_lse(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    return *gradients_lse(grad, grad_lse, q, k, v, mask, ctx.scale, out, lse), None, None


def gradients_lse(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v. Blocks of queries, so that memory stays linear in the sequence.

    With ``P = exp(S - lse)``: ``dS = P * (dP - rowsum(grad * out) + grad_lse)``.
    """
    scale, block, queries = softmax_scale(q, scale), 1024, q.shape[1]
    q_w, k_w, v_w, grad_w = wide(q), wide(k), wide(v), wide(grad)
    shift = grad_lse - (grad_w * wide(out)).sum(-1).transpose(1, 2)
    grad_k, grad_v, grad_q = torch.zeros_like(k_w), torch.zeros_like(v_w), []
    for a in range(0, queries, block):
        b = min(a + block, queries)
        part = mask if mask is None or mask.dim() == 2 else mask[..., a:b, :]
        scores, hidden = masked_scores(q_w[:, a:b], k_w, part, scale)
        weights = (scores - lse[..., a:b, None]).exp()
        weights = weights if hidden is None else weights.masked_fill(hidden, 0)
        grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad_w[:, a:b], v_w)
        grad_scores = weights * (grad_weights + shift[..., a:b, None]) * scale
        grad_q.append(torch.einsum("bhqk,bkhd->bqhd", grad_scores, k_w))
        grad_k += torch.einsum("bhqk,bqhd->bkhd", grad_scores, q_w[:, a:b])
        grad_v += torch.einsum("bhqk,bqhd->bkhd", weights, grad_w[:, a:b])
    grad_q_w = torch.cat(grad_q, 1) if grad_q else torch.zeros_like(q_w)
    return grad_q_w.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def samples_lse(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every query sees a key: a log-sum-exp of -inf has no gradient to check."""
    args = samples(device, dtype)
    return [a for a in args if a[1].shape[1] and (a[3] is None or bool(a[3].any(-1).all()))]


def workloads_lse(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Smaller: the original holds all scores."""
    shape = (1, 1024, 12, 64)
    return {"1x1024x12x64": lambda: (*(draw(shape, device, dtype) for _ in range(3)), None, None)}


op_lse = Op(
    "attention_lse(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale) -> (Tensor, Tensor)",
    checker("attention_lse"),
    reference_lse,
    samples_lse,
    workloads_lse,
    random_args,
    cost,
    fake=fake_lse,
    save=save_lse,
    backward=backward_lse,
)


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """PyTorch's own CPU kernel, in float32: in 16 bits its log-sum-exp is off by 1e-5."""
    wide_q, wide_k, wide_v = (wide(t).transpose(1, 2) for t in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        wide_q, wide_k, wide_v, scale=softmax_scale(q, scale)
    )
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous()


def flash_cpu_refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> str | None:
    if mask is not None:
        return "it takes no mask"
    if q.dtype == torch.float64:
        return "float64 is for the reference"
    if 0 in (*q.shape, *k.shape):
        return "a size is 0"
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return "head_dim must have stride 1"
    return None


op_lse.add_backend("cpu", Backend("flash_cpu", flash_cpu, flash_cpu_refuses))


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`attention` together with ``logsumexp(q k^T * scale)`` over the keys; both are differentiable.

    Results over parts of the keys merge exactly: with ``lse = logaddexp(lse_a, lse_b)``,
    ``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)``.

    Args:
        q, k, v, mask, scale: as in :func:`attention`.

    Returns:
        ``out`` ``(batch, queries, heads, head_dim)`` in ``q``'s dtype and ``lse`` ``(batch, heads, queries)`` in
        float32 (float64 where ``q`` is); a query that may attend to nothing gets 0 and ``-inf``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return op_lse(q, k, v, mask, scale)
