# SPDX-License-Identifier: Apache-2.0
"""Attention to a part of the keys: forward, merge and backward, with partial results in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import wide
from ..attention import attention_lse, op_lse
from ..attention_backward import QUERIES
from ..attention_backward import op as attention_backward
from ..merge_attention import merge_attention

Partial = tuple[Tensor, Tensor]  # out (batch, queries, heads, head_dim), log-sum-exp (batch, heads, queries)


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
    """Attention to the keys of both, by :func:`vidgen.ops.merge_attention`."""
    return b if a is None else merge_attention(*a, *b)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The share that one block of keys has in the gradients, in float32; ``out`` and ``lse`` are those of all keys."""
    if q.device.type == "cpu":  # as in `attend`
        grad, q, k, v, out = (wide(t) for t in (grad, q, k, v, out))
    return attention_backward(grad.to(q.dtype), q, k, v, out, lse, mask, scale)
