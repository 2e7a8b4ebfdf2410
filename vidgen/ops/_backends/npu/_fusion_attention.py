# SPDX-License-Identifier: Apache-2.0
"""The one place that calls ``npu_fusion_attention``: what is easily got wrong in its arguments is settled here.

Its ``scale`` defaults to 1, so it is always passed. Its mask says which positions to *drop*. Packed sequences (TND)
come with cumulative lengths and no mask. The statistics are ``(batch, heads, queries, 8)`` in float32, eight times one
value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _guards

NAMES = ("npu_fusion_attention", "npu_fusion_attention_grad")


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, drop: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(batch, sequence, heads, head_dim)`` to the same, and the maxima and the sums of the rows."""
    refusal = _guards.attention(q, k, v) or (None if drop is None else _guards.dropped(drop, q, k))
    if refusal is not None:
        raise ValueError(f"npu_fusion_attention: {refusal}")
    out = torch.ops.npu.npu_fusion_attention.default(q, k, v, q.shape[2], "BSND", atten_mask=drop, scale=scale)
    return out[0], out[1], out[2]


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    scale: float,
    drop: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v in BSND, from statistics and results over these keys or more. The scale has another name there."""
    refusal = _guards.attention(q, k, v) or (None if drop is None else _guards.dropped(drop, q, k))
    if refusal is not None:
        raise ValueError(f"npu_fusion_attention_grad: {refusal}")
    grads = torch.ops.npu.npu_fusion_attention_grad.default(
        *(q, k, v, grad, q.shape[2], "BSND"),
        atten_mask=drop,
        softmax_max=maximum,
        softmax_sum=total,
        attention_in=out,
        scale_value=scale,
    )
    return grads[0], grads[1], grads[2]


def packed(q: Tensor, k: Tensor, v: Tensor, scale: float, ends: Sequence[int], key_ends: Sequence[int]) -> Tensor:
    """``(tokens, heads, head_dim)`` of sequences one after the other, each attending to its own keys."""
    refusal = _guards.packed_attention(q, k, v, ends, key_ends)
    if refusal is not None:
        raise ValueError(f"npu_fusion_attention: {refusal}")
    out = torch.ops.npu.npu_fusion_attention.default(
        q, k, v, q.shape[1], "TND", scale=scale, actual_seq_qlen=list(ends), actual_seq_kvlen=list(key_ends)
    )
    return out[0]


def log_sum_exp(maximum: Tensor, total: Tensor) -> Tensor:
    """(batch, heads, queries) from the statistics."""
    return maximum[..., 0] + total[..., 0].log()


def statistics(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and sums that stand for ``lse`` (..., queries): any pair will do whose ``max + log(sum)`` it is."""
    maximum = lse.float().unsqueeze(-1).expand(*lse.shape, 8).contiguous()
    return maximum, torch.ones_like(maximum)
