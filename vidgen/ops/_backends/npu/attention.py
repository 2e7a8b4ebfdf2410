# SPDX-License-Identifier: Apache-2.0
"""``attention`` by npu_fusion_attention, which has a gradient of its own.

A mask over keys becomes packed sequences where it can be read (``_packing``), other masks go along as they are. What
a query gets that may attend to nothing is not documented, so it is shown all keys and its result made 0 afterwards.
"""

from __future__ import annotations

from torch import Tensor

from ...attention import per_head, softmax_scale
from . import _fusion_attention, _guards
from ._packing import Packing, read, readable


def refuse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> str | None:
    return _guards.available(*_fusion_attention.NAMES) or _guards.attention(q, k, v)


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    scale = softmax_scale(q, scale)
    if mask is None:
        return _fusion_attention.dense(q, k, v, scale)[0]
    if mask.dim() == 2 and readable(mask) and (packing := read([mask], (), lambda: mask)) and fits(q, k, packing):
        return attend_packed(q, k, v, packing, scale)
    return attend_masked(q, k, v, mask, scale)


def fits(q: Tensor, k: Tensor, packing: Packing) -> bool:
    """Whether all sequences together are within the limits of one packed call."""
    if packing.rows is None:
        return True
    tokens = max(q.shape[0] * q.shape[1], packing.ends[-1])
    return len(packing.ends) <= _guards.SEQUENCES and tokens <= _guards.TOKENS


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
    batch, queries = q.shape[:2]
    if packing.rows is None:
        out = _fusion_attention.dense(q, k, v, scale)[0]
    else:
        k, v = (t.flatten(0, 1).index_select(0, packing.rows) for t in (k, v))
        ends = [queries * (i + 1) for i in range(batch)]
        out = _fusion_attention.packed(q.flatten(0, 1), k, v, scale, ends, packing.ends).unflatten(0, (batch, queries))
    return out if packing.blind is None else out.masked_fill(packing.blind[:, None, None, None], 0)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    drop, blind = dropped(q, k, mask)
    return _fusion_attention.dense(q, k, v, scale, drop)[0].masked_fill(blind.transpose(1, 2), 0)


def dropped(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as npu_fusion_attention wants it, (batch, heads or 1, queries, keys), True = drop; and which rows see
    nothing, (batch, heads or 1, queries or 1, 1): of those it drops nothing."""
    allowed = per_head(mask)
    blind = ~allowed.any(-1, keepdim=True)
    drop = ~(allowed | blind)
    return drop.expand(*drop.shape[:2], q.shape[1], k.shape[1]).contiguous(), blind
