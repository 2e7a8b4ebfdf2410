# SPDX-License-Identifier: Apache-2.0
"""Attention to a part of the keys: forward, merge and backward, with partial results in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import wide
from ..attention import attention_lse, op_lse, softmax_scale

Partial = tuple[Tensor, Tensor]  # out (batch, queries, heads, head_dim), log-sum-exp (batch, heads, queries)

QUERIES = 1024  # at a time, where there is no kernel: memory stays linear in the sequence


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """:func:`vidgen.ops.attention_lse` to one block of keys."""
    if q.device.type == "cpu":  # its kernel takes float32 only; elsewhere one takes 16 bits and sums in 32
        q, k, v = wide(q), wide(k), wide(v)
    candidates = op_lse.candidates(q.device.type)
    kernel = any(c.name != "reference" and c.refuse(q, k, v, mask, scale) is None for c in candidates)
    rows = q.split(q.shape[1] if kernel else QUERIES, 1)
    outs, lses = zip(*(attention_lse(some, k, v, mask=mask, scale=scale) for some in rows), strict=True)
    return (wide(outs[0]), lses[0]) if len(rows) == 1 else (wide(torch.cat(outs, 1)), torch.cat(lses, 2))


def merge(a: Partial | None, b: Partial) -> Partial:
    """Attention to the keys of both.

    With ``lse = logaddexp(lse_a, lse_b)``: ``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)``. A row that
    has seen no key is 0 with log-sum-exp -inf, and stays so.
    """
    if a is None:
        return b
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    seen = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = ((part - seen).exp().transpose(1, 2).unsqueeze(-1) for part in (lse_a, lse_b))
    return out_a * weight_a + out_b * weight_b, lse


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The share that one block of keys has in the gradients, in float32.

    ``out`` and ``lse`` are those of *all* keys, so that ``P = exp(S - lse)`` are the final weights of this block and
    ``dS = P * (dP - rowsum(grad * out))``: nothing has to be merged.
    """
    grad, q, k, v, out = (wide(t) for t in (grad, q, k, v, out))
    if mask is None and q.device.type == "cpu" and q.dtype == torch.float32 and 0 not in (*q.shape, *k.shape):
        return flash_cpu_backward(grad, q, k, v, out, lse, scale)
    return blockwise_backward(grad, q, k, v, out, lse, mask, softmax_scale(q, scale))


def flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own CPU kernel. Rows that see no key need a mask, and so do not come here."""
    # It takes head_dim to have stride 1 and does not look: other strides give wrong gradients without a word.
    grad, q, k, v, out = ((t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in (grad, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, scale=softmax_scale(q, scale)
    )
    return tuple(t.transpose(1, 2) for t in grads)  # type: ignore[return-value]


def blockwise_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * out).sum(-1).transpose(1, 2)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees nothing weighs nothing
    for a in range(0, q.shape[1], QUERIES):
        rows = slice(a, a + QUERIES)
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        weights = (scores - shift[..., rows, None]).exp()
        grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad[:, rows], v)
        grad_scores = weights * (grad_weights - delta[..., rows, None]) * scale
        grad_q[:, rows] = torch.einsum("bhqk,bkhd->bqhd", grad_scores, k)
        grad_k += torch.einsum("bhqk,bqhd->bkhd", grad_scores, q[:, rows])
        grad_v += torch.einsum("bhqk,bqhd->bkhd", weights, grad[:, rows])
    return grad_q, grad_k, grad_v
