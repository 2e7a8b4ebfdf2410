# SPDX-License-Identifier: Apache-2.0
"""Ulysses times ring (arXiv 2405.07719): heads over one group of ranks, keys around another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from .checks import make_plan, place_in
from .ring import Links, attend_in_ring, check_window
from .ulysses import by_heads


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ulysses_group: dist.ProcessGroup,
    ring_group: dist.ProcessGroup,
    *,
    order: str = "ulysses_inner",
    sizes: Sequence[int] | None = None,
    sparse_n: int = 1,
    pattern: str = "single",
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_v: Tensor | None = None,
    text_sizes: Sequence[int] | None = None,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    window: int = 1,
    window_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vidgen.ops.skiparse_attention` of a sequence that lies on ``ulysses x ring`` ranks.

    :func:`ulysses_attention` inside ``ulysses_group``, with :func:`ring_attention` over ``ring_group`` in place of the
    attention of one process. Each rank belongs to one group of either kind.

    Args:
        ulysses_group, ring_group: the groups of this process; they share no other rank.
        order: where the shards of the sequence lie. ``"ulysses_inner"``: rank u of a Ulysses group at place p of the
            ring holds shard ``p * ulysses + u`` (Megatron, yunchang); ``"ring_inner"``: shard ``u * ring + p``
            (MindSpeed-MM's FSDP2 trainer).
        sizes, text_sizes: number of tokens of every shard, in the order of the sequence.
        the others: as in :func:`ulysses_attention` and :func:`ring_attention`.

    Returns:
        As :func:`ulysses_attention`.

    Raises:
        ValueError: as :func:`ring_attention`; an unknown ``order``; the groups share more than this rank.
    """
    op = "usp_attention"
    place_in(op, "ulysses_group", ulysses_group)
    place_in(op, "ring_group", ring_group)
    check_window(op, ring_group, window, window_group)
    plan = make_plan(
        op,
        *(q, k, v, text_q, text_k, text_v),
        ulysses_group=ulysses_group,
        ring_group=ring_group,
        order=order,
        sizes=sizes,
        text_sizes=text_sizes,
        mask=mask,
        text_mask=text_mask,
        sparse_n=sparse_n,
        pattern=pattern,
    )
    attend = partial(
        attend_in_ring,
        plan=plan,
        links=Links(ring_group, window_group or ring_group, window),
        sparse_n=sparse_n,
        pattern=pattern,
        mask=mask,
        text_mask=text_mask,
        scale=scale,
    )
    return by_heads(q, k, v, text_q, text_k, text_v, plan, ulysses_group, attend)
