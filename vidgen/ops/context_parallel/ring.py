# SPDX-License-Identifier: Apache-2.0
"""Ring attention: keys and values travel from rank to rank past queries that stay (arXiv 2310.01889), in one ring or
in rings of rings (arXiv 2406.18485)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import wide
from ..skiparse_index import groups_to_tokens, skiparse_padded_length, tokens_to_groups
from .blocks import Partial, attend, attend_backward, merge
from .checks import Plan, make_plan, place_in
from .exchange import gather
from .layout import shard_sizes, starts

KV_TAG, WINDOW_TAG, GRAD_TAG = 0, 1, 2  # for gloo; other backends match messages by their order


def ring_attention(
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
    window: int = 1,
    window_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`vidgen.ops.skiparse_attention` of a sequence whose tokens lie on the ranks of ``group``.

    Each rank attends with its queries to one shard of keys and values after the other, while the next one is on its
    way. Partial results and their log-sum-exp stay in float32 and are rounded once, at the end, so that the error does
    not grow with the ring. The backward pass sends keys and values around once more, and their gradients in float32.
    Each rank sends ``2 * tokens * heads * head_dim * (ranks - 1)`` elements forward.

    Text is read by all and does not travel. Its queries are divided among the ranks.

    Args:
        q, k, v, group, text_q, text_k, text_v, text_sizes, mask, text_mask, scale: as in :func:`ulysses_attention`.
        sizes: as there. With ``sparse_n`` above 1 all shards begin at a multiple of ``sparse_n`` (pattern ``"single"``)
            or of its square (``"group"``), as those of :func:`shard_sizes` with :func:`skiparse_multiple` do.
        window: length of the inner rings, a divisor of the ranks. Shards go around consecutive ``window`` ranks while
            they are on their way to the next such window, so that slow links between nodes have more time. 1, or all
            ranks: a single ring.
        window_group: a second group of the same ranks for the hops between windows, which are behind the others in one
            queue where a backend runs the messages of a group in turn (nccl, hccl).

    Returns:
        ``(batch, tokens, heads, head_dim)``; with ``text_q`` the pair of it and the text's, spread or repeated over the
        ranks as the text is.

    Raises:
        ValueError: as in :func:`ulysses_attention`; shards that begin inside a round of groups; ``window`` does not
            divide the ranks.
    """
    op = "ring_attention"
    check_window(op, group, window, window_group)
    plan = make_plan(
        op,
        *(q, k, v, text_q, text_k, text_v),
        ulysses_group=None,
        ring_group=group,
        order="ulysses_inner",
        sizes=sizes,
        text_sizes=text_sizes,
        mask=mask,
        text_mask=text_mask,
        sparse_n=sparse_n,
        pattern=pattern,
    )
    links = Links(group, window_group or group, window)
    out, text_out = attend_in_ring(
        *(q, k, v, text_q, text_k, text_v),
        plan=plan,
        links=links,
        sparse_n=sparse_n,
        pattern=pattern,
        mask=mask,
        text_mask=text_mask,
        scale=scale,
    )
    return out if text_out is None else (out, text_out)


@dataclass(frozen=True)
class Links:
    """The ring's ranks, in windows of ``window``, and who carries the messages."""

    group: dist.ProcessGroup
    window_group: dist.ProcessGroup
    window: int

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def check_window(op: str, group: dist.ProcessGroup, window: int, window_group: dist.ProcessGroup | None) -> None:
    _, ranks = place_in(op, "group", group)
    if window < 1 or ranks % window:
        raise ValueError(f"{op}: window must divide the {ranks} ranks of the ring, got {window}")
    if window_group is not None:
        place_in(op, "window_group", window_group)
        if dist.get_process_group_ranks(window_group) != dist.get_process_group_ranks(group):
            raise ValueError(f"{op}: window_group must have the ranks of group in the same order")


def attend_in_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    *,
    plan: Plan,
    links: Links,
    sparse_n: int,
    pattern: str,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """The Skiparse groups as more samples, and the queries of the text behind those of the video."""
    batch, tokens = q.shape[:2]
    lengths = [sum(plan.sizes[shard] for shard in block) for block in plan.blocks]
    shown = [None if mask is None else columns(mask, plan.sizes, block) for block in plan.blocks]
    masks = [group_mask(m, batch, n, sparse_n, pattern, q.device) for m, n in zip(shown, lengths, strict=True)]

    def grouped(x: Tensor) -> Tensor:
        return tokens_to_groups(x, sparse_n, pattern).flatten(0, 1)

    def in_every_group(text: Tensor) -> Tensor:
        return text.repeat_interleave(sparse_n, 0)

    if text_k is not None and text_v is not None:
        if plan.text_sizes is not None:
            text_lengths = [sum(plan.text_sizes[shard] for shard in block) for block in plan.blocks]
            text_k, text_v = gather(torch.stack((text_k, text_v)), 2, text_lengths, links.group)
            if text_mask is not None:  # in the order in which the ring gathers
                text_mask = torch.cat([columns(text_mask, plan.text_sizes, block) for block in plan.blocks], 1)
        else:
            text_lengths = list(shard_sizes(text_k.shape[1], links.ranks))
            text_q = None if text_q is None else text_q.split(text_lengths, 1)[links.rank]
        text_k, text_v = in_every_group(text_k), in_every_group(text_v)
        text_mask = None if text_mask is None else in_every_group(text_mask)

    queries = grouped(q)
    places = queries.shape[1]
    if text_q is not None:
        queries = torch.cat((queries, in_every_group(text_q)), 1)
    rows = [skiparse_padded_length(n, sparse_n) // sparse_n for n in lengths]
    course = Course(links, rows, masks, text_mask, scale)
    out = _Ring.apply(course, queries, grouped(k), grouped(v), text_k, text_v).unflatten(0, (batch, sparse_n))
    visual = groups_to_tokens(out[:, :, :places], tokens, pattern)
    if text_q is None:
        return visual, None
    text_out = out[:, :, places:].mean(1)
    if plan.text_sizes is None:
        text_out = gather(text_out, 1, text_lengths, links.group)
    return visual, text_out


def columns(mask: Tensor, sizes: Sequence[int], block: Sequence[int]) -> Tensor:
    """The part of a mask over the sequence that belongs to the shards of ``block``."""
    begin = starts(sizes)
    return torch.cat([mask[:, begin[shard] : begin[shard + 1]] for shard in block], 1)


def group_mask(
    mask: Tensor | None, batch: int, tokens: int, sparse_n: int, pattern: str, device: torch.device
) -> Tensor | None:
    """Which keys of a block may be seen, ``(batch * groups, places)``: neither hidden ones nor padding."""
    if mask is None and tokens == skiparse_padded_length(tokens, sparse_n):
        return None
    if mask is None:
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    return tokens_to_groups(mask, sparse_n, pattern).flatten(0, 1)


# The ring itself. Rank r is place r % window of window r // window. In step ``inner`` of round ``outer`` it holds the
# keys and values of the rank that many places, and that many windows, before it.


@dataclass(frozen=True)
class Course:
    """What the ranks of a ring know of each other: ``rows`` and ``masks`` are those of every rank's keys."""

    links: Links
    rows: list[int]
    masks: list[Tensor | None]
    text_mask: Tensor | None
    scale: float | None

    def neighbour(self, windows: int, places: int) -> int:
        """The rank so many windows and places further on."""
        length, ranks = self.links.window, self.links.ranks
        window, place = divmod(self.links.rank, length)
        return (window + windows) % (ranks // length) * length + (place + places) % length

    def hop(self, sent: Tensor, windows: int, places: int, rows: int, tag: int) -> Hop:
        """Pass ``sent`` on by so many windows and places, and get ``rows`` of keys from behind."""
        to, origin = self.neighbour(windows, places), self.neighbour(-windows, -places)
        group = self.links.window_group if tag == WINDOW_TAG else self.links.group
        return Hop(sent, to, origin, rows, group, tag)


class Hop:
    """A tensor ``(2, batch, keys, heads, head_dim)`` on its way to one rank, while another's arrives."""

    def __init__(self, sent: Tensor, to: int, origin: int, rows: int, group: dist.ProcessGroup, tag: int) -> None:
        self.sent, self.works = sent, []  # kept until the message has left
        if to == dist.get_rank(group):
            self.arriving = sent
            return
        self.arriving = sent.new_empty(*sent.shape[:2], rows, *sent.shape[3:])
        messages = []
        for post, tensor, other in ((dist.isend, sent, to), (dist.irecv, self.arriving, origin)):
            if tensor.numel():  # both sides know the sizes
                messages.append(dist.P2POp(post, tensor, dist.get_global_rank(group, other), group, tag))
        self.works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, course: Course, q: Tensor, k: Tensor, v: Tensor, text_k: Tensor | None, text_v: Tensor | None
    ) -> Tensor:
        ctx.course = course
        links, total = course.links, None
        kv = torch.stack((k, v))
        for outer in range(links.ranks // links.window):
            far = start_round(course, kv, outer)
            for inner in range(links.window):
                near = start_step(course, kv, outer, inner)
                if outer == inner == 0 and text_k is not None and text_v is not None:
                    total = attend_block(total, q, text_k, text_v, course.text_mask, course.scale)
                mask = course.masks[course.neighbour(-outer, -inner)]
                total = attend_block(total, q, kv[0], kv[1], mask, course.scale)
                kv = near.wait() if near else kv
            kv = far.wait() if far else kv
        assert total is not None
        out, lse = total[0].to(q.dtype), total[1]
        ctx.save_for_backward(q, k, v, text_k, text_v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, text_k, text_v, out, lse = ctx.saved_tensors
        course, links = ctx.course, ctx.course.links
        grad_q = torch.zeros_like(wide(q))
        grad_text: list[Tensor | None] = [None, None]
        kv, returning = torch.stack((k, v)), None
        for outer in range(links.ranks // links.window):
            far = start_round(course, kv, outer)
            for inner in range(links.window):
                near = start_step(course, kv, outer, inner)
                if outer == inner == 0 and text_k is not None:
                    more, *grads = block_gradients(grad, q, text_k, text_v, out, lse, course.text_mask, course.scale)
                    grad_q += more
                    grad_text = [g.to(text_k.dtype) for g in grads]
                mask = course.masks[course.neighbour(-outer, -inner)]
                more, *grads = block_gradients(grad, q, kv[0], kv[1], out, lse, mask, course.scale)
                grad_q += more
                grad_kv = torch.stack(grads)
                if returning is not None:
                    grad_kv += returning.wait()
                # The gradients follow their keys. Those that leave a window are one place short of a full round
                # of it, and so change places too.
                last = inner == links.window - 1
                rows = course.rows[course.neighbour(-outer - 1, 0) if last else course.neighbour(-outer, -inner - 1)]
                returning = course.hop(grad_kv, int(last), 1, rows, GRAD_TAG)
                kv = near.wait() if near else kv
            kv = far.wait() if far else kv
        assert returning is not None
        grad_k, grad_v = returning.wait().to(k.dtype)
        return None, grad_q.to(q.dtype), grad_k, grad_v, *grad_text


def start_round(course: Course, kv: Tensor, outer: int) -> Hop | None:
    """Send the window's first keys on to the next window, for as long as this round takes."""
    if outer == course.links.ranks // course.links.window - 1:
        return None
    return course.hop(kv, 1, 0, course.rows[course.neighbour(-outer - 1, 0)], WINDOW_TAG)


def start_step(course: Course, kv: Tensor, outer: int, inner: int) -> Hop | None:
    """Send the keys to the next place of the window, for as long as this step takes."""
    if inner == course.links.window - 1:
        return None
    return course.hop(kv, 0, 1, course.rows[course.neighbour(-outer, -inner - 1)], KV_TAG)


def attend_block(
    total: Partial | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Partial:
    if q.numel() and k.numel():
        return merge(total, attend(q, k, v, mask, scale))
    if total is not None:
        return total
    nothing = torch.zeros_like(wide(q))
    return nothing, nothing.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)


def block_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() and k.numel():
        return attend_backward(grad, q, k, v, out, lse, mask, scale)
    return tuple(torch.zeros_like(wide(t)) for t in (q, k, v))  # type: ignore[return-value]
