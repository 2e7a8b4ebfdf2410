# SPDX-License-Identifier: Apache-2.0
"""Skiparse group parallelism: whole groups on each rank, so that attention exchanges nothing.

Between a single-skip and a group-skip layer the hidden states move once, where Ulysses moves q, k, v and the result.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .._checks import wide
from ..attention import attention
from .checks import check_mask, check_tensors, place_in
from .exchange import all_reduce, move
from .layout import Groups, Placement, shard_sizes, starts
from .ulysses import to_heads, to_tokens


def move_tokens(x: Tensor, source: Placement, target: Placement, group: dist.ProcessGroup) -> Tensor:
    """Rows of a sequence from one placement on the ranks of ``group`` to another.

    One exchange, in which each rank sends the rows that it does not keep; none where the placements are equal. Between
    ``Groups`` of the two patterns, with as many groups as ranks or more, that is ``tokens * (ranks - 1) / ranks`` rows.

    Args:
        x: this rank's rows ``(batch, tokens, ...)`` in the order of ``source.tokens(rank)``, any dtype, any strides.
        source, target: :class:`Shards` or :class:`Groups` of one length over these ranks.
        group: the ranks; this process must be one of them.

    Returns:
        ``(batch, tokens, ...)`` in the order of ``target.tokens(rank)``, contiguous.

    Raises:
        ValueError: ``x`` or a placement does not fit.
    """
    op = "move_tokens"
    rank, ranks = place_in(op, "group", group)
    for name, placement in (("source", source), ("target", target)):
        if placement.ranks != ranks:
            raise ValueError(f"{op}: {name} is for {placement.ranks} ranks, the group has {ranks}")
    if source.num_tokens != target.num_tokens:
        raise ValueError(f"{op}: source has {source.num_tokens} tokens, target {target.num_tokens}")
    if x.dim() < 2 or x.shape[1] != len(source.tokens(rank)):
        wanted = f"(batch, {len(source.tokens(rank))}, ...)"
        raise ValueError(f"{op}: x must be {wanted} for rank {rank}, got {tuple(x.shape)}")
    return move(x, source, target, group)


def skiparse_group_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    placement: Groups,
    group: dist.ProcessGroup,
    *,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_v: Tensor | None = None,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vidgen.ops.skiparse_attention` of tokens that lie on the ranks as ``placement`` says.

    With ``sparse_n`` of at least the ranks each holds whole groups and nothing is exchanged. With fewer groups, those
    of a cell are shared by its ranks as in :func:`ulysses_attention`. The text's result, a mean over the groups, is
    summed over the ranks: ``2 * text * heads * head_dim * (ranks - 1) / ranks`` elements sent by each.

    Hidden states come into a placement by :func:`move_tokens`; per-token inputs, such as rotary tables, are indexed
    with ``placement.tokens(rank)``. Dense layers of such a model take the tokens as they lie: :func:`ulysses_attention`
    with the placement's token counts as ``sizes``, for the order of the tokens is free there.

    Args:
        q, k, v: this rank's ``(batch, tokens, heads, head_dim)`` in the order of ``placement.tokens(rank)``.
        placement: the groups and their ranks.
        group: the ranks; this process must be one of them.
        text_q, text_k, text_v: ``(batch, text, heads, head_dim)``, the same on each rank, as in
            :func:`ulysses_attention`; the gradients are to be summed over the ranks.
        mask: ``(batch, tokens of all ranks)`` bool in the order of the sequence, True = attend to this token.
        text_mask: ``(batch, text)`` bool.
        scale: default ``head_dim ** -0.5``.

    Returns:
        ``(batch, tokens, heads, head_dim)``; with ``text_q`` the pair of it and the text's, the same on each rank.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or ``placement``, or this process is not in
            ``group``.
    """
    op = "skiparse_group_parallel"
    rank, ranks = place_in(op, "group", group)
    check_tensors(op, q, k, v, text_q, text_k, text_v, placement.sparse_n, placement.pattern)
    if placement.ranks != ranks:
        raise ValueError(f"{op}: placement is for {placement.ranks} ranks, the group has {ranks}")
    if q.shape[1] != len(placement.tokens(rank)):
        raise ValueError(f"{op}: placement gives rank {rank} {len(placement.tokens(rank))} tokens, got {q.shape[1]}")
    if text_k is None and text_mask is not None:
        raise ValueError(f"{op}: text_mask needs text_k and text_v")
    check_mask(op, "mask", mask, q, placement.num_tokens)
    check_mask(op, "text_mask", text_mask, q, 0 if text_k is None else text_k.shape[1])

    members = placement.members(rank)
    shared = len(members) > 1
    heads = list(shard_sizes(q.shape[2], len(members)))
    own = rank - members[0]
    sizes = [len(placement.tokens(member)) for member in members]
    if shared:
        q, k, v = to_heads([q, k, v], [sizes] * 3, heads, group, members)
        text_q, text_k, text_v = (None if t is None else t.split(heads, 2)[own] for t in (text_q, text_k, text_v))
    if mask is not None:
        mask = mask[:, torch.cat([placement.tokens(member) for member in members]).to(mask.device)]
    out, text_out = attend_groups(
        q, k, v, text_q, text_k, text_v, placement.group_lengths(rank), mask=mask, text_mask=text_mask, scale=scale
    )
    if shared:
        (out,) = to_tokens([out], [sizes], heads, group, members)
    if text_out is None:
        return out
    begin = starts(heads)
    # The other ranks of a cell have the other heads: zeros there make one sum of both.
    text_out = F.pad(text_out / placement.sparse_n, (0, 0, begin[own], begin[-1] - begin[own + 1])).to(q.dtype)
    return out, all_reduce(text_out, 1, shard_sizes(text_out.shape[1], ranks), group)


def attend_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    lengths: tuple[int, ...],
    *,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention inside each of some groups that lie one after the other; the text's result is the *sum* over them.

    Groups become samples, as long as the longest, in one call.
    """
    batch, places, count = q.shape[0], max(lengths), len(lengths)

    def grouped(x: Tensor, text: Tensor | None) -> Tensor:
        ragged = min(lengths) != places
        if ragged:
            padding = (0, 0) * (x.dim() - 2)
            runs = [F.pad(run, (*padding, 0, places - run.shape[1])) for run in x.split(list(lengths), 1)]
        x = torch.stack(runs, 1) if ragged else x.unflatten(1, (count, places))
        if text is not None:
            x = torch.cat((x, text.unsqueeze(1).expand(-1, count, *(-1,) * (text.dim() - 1))), 2)
        return x.flatten(0, 1)

    allowed = None
    if mask is not None or text_mask is not None or min(lengths) != places:
        shown = torch.ones(batch, sum(lengths), dtype=torch.bool, device=q.device) if mask is None else mask
        if text_k is not None and text_mask is None:
            text_mask = torch.ones(batch, text_k.shape[1], dtype=torch.bool, device=q.device)
        allowed = grouped(shown, text_mask)
    attended = attention(grouped(q, text_q), grouped(k, text_k), grouped(v, text_v), mask=allowed, scale=scale)
    assert isinstance(attended, Tensor)
    out = attended.unflatten(0, (batch, count))
    visual = torch.cat([out[:, i, :length] for i, length in enumerate(lengths)], 1)
    return visual, None if text_q is None else wide(out[:, :, places:]).sum(1)
