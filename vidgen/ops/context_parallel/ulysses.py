# SPDX-License-Identifier: Apache-2.0
"""Ulysses: all tokens of some of the heads on each rank, for the time of attention (arXiv 2309.14509)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..skiparse_attention import skiparse_attention
from .checks import Plan, make_plan, place_in
from .exchange import Shape, exchange
from .layout import shard_sizes

# (q, k, v, text_q, text_k, text_v) of some heads to (out, text_out)
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup,
    *,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vidgen.ops.skiparse_attention` of a sequence whose tokens lie on the ranks of ``group``.

    q, k and v change from some tokens of all heads to all tokens of some heads in one exchange, the result changes
    back in another. Each rank sends ``4 * tokens * heads * head_dim * (ranks - 1) / ranks`` elements. Any number of
    tokens and of heads will do, fewer heads than ranks too; nothing is padded.

    Args:
        q, k, v: this rank's ``(batch, tokens, heads, head_dim)``, floating point, any strides. The ranks' shards, in
            rank order, are the sequence.
        group: the ranks; this process must be one of them.
        sizes: number of tokens on every rank. None: the ranks tell each other, and compare their arguments, in a small
            exchange of its own; ValueError on all of them where they disagree. With ``sizes`` there is none, and each
            rank checks its own arguments only.
        sparse_n, pattern: Skiparse groups; 1 is dense attention. The order of the tokens is free where it is 1.
        text_k, text_v: text that all tokens attend to, like ``k``; both or neither.
        text_q: the text's own queries; without it nothing is computed for the text.
        text_sizes: number of text tokens on every rank. None: each rank holds all of the text, and the same. Such text
            gets a part of its gradient on each rank, which are to be summed over the ranks, as those of parameters are.
        mask: ``(batch, tokens of all ranks)`` bool, True = attend to this token.
        text_mask: ``(batch, text tokens)`` bool, the same for all of the text.
        scale: default ``head_dim ** -0.5``.

    Returns:
        ``(batch, tokens, heads, head_dim)``; with ``text_q`` the pair of it and the text's, spread or repeated over the
        ranks as the text is.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or ``sizes``, this process is not in ``group``,
            or, without ``sizes``, the ranks' arguments do not fit each other.
    """
    op = "ulysses_attention"
    place_in(op, "group", group)
    plan = make_plan(
        op,
        *(q, k, v, text_q, text_k, text_v),
        ulysses_group=group,
        ring_group=None,
        order="ulysses_inner",
        sizes=sizes,
        text_sizes=text_sizes,
        mask=mask,
        text_mask=text_mask,
        sparse_n=sparse_n,
        pattern=pattern,
    )

    attend = partial(attend_here, sparse_n=sparse_n, pattern=pattern, mask=mask, text_mask=text_mask, scale=scale)
    return by_heads(q, k, v, text_q, text_k, text_v, plan, group, attend)


def attend_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    *,
    sparse_n: int,
    pattern: str,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    out = skiparse_attention(
        q,
        k,
        v,
        sparse_n=sparse_n,
        pattern=pattern,
        text_q=text_q,
        text_k=text_k,
        text_v=text_v,
        mask=mask,
        text_mask=text_mask,
        scale=scale,
    )
    return out if isinstance(out, tuple) else (out, None)


def by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    plan: Plan,
    group: dist.ProcessGroup,
    attend: Attend,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attend`` to the tokens of this rank's block with a share of the heads, then put both back as they were."""
    block, rank = plan.blocks[plan.ring], plan.ulysses
    heads = shard_sizes(q.shape[2], len(block))
    sizes = [plan.sizes[shard] for shard in block]
    text = [t for t in (text_q, text_k, text_v) if t is not None]
    if plan.text_sizes is None:
        q, k, v = to_heads([q, k, v], [sizes] * 3, heads, group)
        text = [t.split(heads, 2)[rank] for t in text]
    else:
        text_sizes = [plan.text_sizes[shard] for shard in block]
        q, k, v, *text = to_heads([q, k, v, *text], [sizes] * 3 + [text_sizes] * len(text), heads, group)
    if text_q is None:
        text = [None, *text] if text else [None] * 3  # type: ignore[list-item]
    out, text_out = attend(q, k, v, *text)
    if text_out is None:
        return to_tokens([out], [sizes], heads, group)[0]
    out, text_out = to_tokens([out, text_out], [sizes, None if plan.text_sizes is None else text_sizes], heads, group)
    return out, text_out


def to_heads(
    tensors: list[Tensor],
    sizes: list[list[int]],
    heads: Sequence[int],
    group: dist.ProcessGroup,
    members: Sequence[int] | None = None,
) -> list[Tensor]:
    """From ``sizes[i][m]`` tokens of all heads to all tokens of ``heads[m]`` heads, every tensor i in one exchange.

    ``members`` are the ranks of ``group`` that take part; None: all. The others must call it with members of their own.
    """
    own = heads[_place(group, members)]
    split = [t.split(list(heads), 2) for t in tensors]
    shapes = [
        [(t.shape[0], size[m], own, t.shape[3]) for t, size in zip(tensors, sizes, strict=True)]
        for m in range(len(heads))
    ]
    arrived = _exchange_among(members, list(zip(*split, strict=True)), shapes, group)
    return [torch.cat(shards, 1) for shards in zip(*arrived, strict=True)]


def to_tokens(
    tensors: list[Tensor],
    sizes: list[list[int] | None],
    heads: Sequence[int],
    group: dist.ProcessGroup,
    members: Sequence[int] | None = None,
) -> list[Tensor]:
    """The inverse of :func:`to_heads`; a tensor whose sizes are None goes to all ranks as a whole."""
    own = _place(group, members)
    split = [[t] * len(heads) if size is None else t.split(size, 1) for t, size in zip(tensors, sizes, strict=True)]
    tokens = [t.shape[1] if size is None else size[own] for t, size in zip(tensors, sizes, strict=True)]
    shapes = [[(t.shape[0], n, count, t.shape[3]) for t, n in zip(tensors, tokens, strict=True)] for count in heads]
    arrived = _exchange_among(members, list(zip(*split, strict=True)), shapes, group)
    return [torch.cat(shares, 2) for shares in zip(*arrived, strict=True)]


def _place(group: dist.ProcessGroup, members: Sequence[int] | None) -> int:
    rank = dist.get_rank(group)
    return rank if members is None else members.index(rank)


def _exchange_among(
    members: Sequence[int] | None,
    pieces: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[Shape]],
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """:func:`exchange` in which a rank has nothing for those outside ``members``: no group of theirs is needed."""
    if members is None:
        return exchange(pieces, shapes, group)
    ranks = range(dist.get_world_size(group))
    to = [pieces[members.index(rank)] if rank in members else [] for rank in ranks]
    of = [shapes[members.index(rank)] if rank in members else [] for rank in ranks]
    arrived = exchange(to, of, group)
    return [arrived[member] for member in members]
