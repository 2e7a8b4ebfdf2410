# SPDX-License-Identifier: Apache-2.0
"""What may be passed to a context-parallel op, and whether the ranks agree about it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import describe, require_device
from ..attention import check_qkv
from ..skiparse_index import require_pattern
from .layout import misplaced_shard, ring_blocks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """Who holds what: ``sizes`` of all shards in sequence order, ``blocks`` as :func:`ring_blocks` gives them.

    This process is Ulysses rank ``ulysses`` at place ``ring`` of the ring. ``text_sizes`` is None where each rank
    holds all of the text.
    """

    sizes: tuple[int, ...]
    text_sizes: tuple[int, ...] | None
    blocks: list[list[int]]
    ulysses: int
    ring: int


def make_plan(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    *,
    ulysses_group: dist.ProcessGroup | None,
    ring_group: dist.ProcessGroup | None,
    order: str,
    sizes: Sequence[int] | None,
    text_sizes: Sequence[int] | None,
    mask: Tensor | None,
    text_mask: Tensor | None,
    sparse_n: int,
    pattern: str,
) -> Plan:
    """Check everything that a call was given, and learn the ``sizes`` from the other ranks where they are None.

    A mode that has no Ulysses or no ring gives None for its group.
    """
    u, num_u = place_in(op, "ulysses_group", ulysses_group) if ulysses_group is not None else (0, 1)
    p, num_p = place_in(op, "ring_group", ring_group) if ring_group is not None else (0, 1)
    if ulysses_group is not None and ring_group is not None:
        shared = {*dist.get_process_group_ranks(ulysses_group)} & {*dist.get_process_group_ranks(ring_group)}
        if len(shared) > 1:
            raise ValueError(f"{op}: ulysses_group and ring_group must share this rank only, got {sorted(shared)}")
    blocks = ring_blocks(num_u, num_p, order)
    own, ranks = blocks[p][u], num_u * num_p

    def check() -> tuple[int, ...] | None:
        check_tensors(op, q, k, v, text_q, text_k, text_v, sparse_n, pattern)
        if text_k is None and (text_mask is not None or text_sizes is not None):
            raise ValueError(f"{op}: text_mask and text_sizes need text_k and text_v")
        check_mask(op, "mask", mask, q)
        check_mask(op, "text_mask", text_mask, q)
        if text_k is None or text_sizes is None:
            return None
        return check_sizes(op, "text_sizes", text_sizes, ranks, own, text_k.shape[1])

    if sizes is not None:
        text_shards = check()
        shards = check_sizes(op, "sizes", sizes, ranks, own, q.shape[1])
    else:
        refusal, text_shards, facts = None, None, dict.fromkeys(FACTS, 0)
        try:
            text_shards = check()
            facts = describe_call(q, text_q, text_k, text_shards, (mask, text_mask), sparse_n, pattern)
        except ValueError as error:
            refusal = str(error)
        groups = [group for group in (ulysses_group, ring_group) if group is not None]
        rows = agree(op, groups, refusal, facts, q.device)
        tokens = {shard: row["tokens"] for shard, row in zip(sum(blocks, []), rows, strict=True)}
        shards = tuple(tokens[shard] for shard in range(ranks))
    text = 0 if text_k is None else text_k.shape[1] if text_shards is None else sum(text_shards)
    check_mask(op, "mask", mask, q, sum(shards))
    check_mask(op, "text_mask", text_mask, q, text)
    if num_p > 1 and (wrong := misplaced_shard(shards, blocks, sparse_n, pattern)) is not None:
        raise ValueError(
            f"{op}: shard {wrong} of {shards} does not begin where a round of {sparse_n} groups does; "
            f"divide the tokens by shard_sizes(tokens, ranks, skiparse_multiple([{sparse_n}]))"
        )
    return Plan(shards, text_shards, blocks, u, p)


def place_in(op: str, name: str, group: dist.ProcessGroup) -> tuple[int, int]:
    """This process's rank in ``group``, and how many there are."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{op}: {name} must be a ProcessGroup that this process is in, got {group!r}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: this process is not in {name}")
    return rank, dist.get_world_size(group)


def check_tensors(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    sparse_n: int,
    pattern: str,
) -> None:
    """What one rank can see on its own."""
    require_pattern(op, sparse_n, pattern)
    check_qkv(op, q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"{op}: k and v must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"{op}: q must be one of {DTYPES}, got {q.dtype}")
    if (text_k is None) != (text_v is None) or (text_k is None and text_q is not None):
        raise ValueError(f"{op}: text_k and text_v go together, and text_q needs both")
    if text_k is None or text_v is None:
        return
    check_qkv(op, text_k if text_q is None else text_q, text_k, text_v, "text_")
    batch, _, heads, dim = q.shape
    if (text_k.shape[0], *text_k.shape[2:]) != (batch, heads, dim) or text_k.dtype != q.dtype:
        raise ValueError(f"{op}: text must match q, {describe(q)}, got text_k {describe(text_k)}")
    if text_q is not None and text_q.shape != text_k.shape:
        raise ValueError(f"{op}: text_q must have text_k's shape {tuple(text_k.shape)}, got {tuple(text_q.shape)}")
    require_device(op, "text_k", text_k, q)


def check_sizes(op: str, name: str, sizes: Sequence[int], ranks: int, rank: int, tokens: int) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) != ranks or min(sizes) < 0:
        raise ValueError(f"{op}: {name} must be {ranks} token counts, one a rank, got {sizes}")
    if sizes[rank] != tokens:
        raise ValueError(f"{op}: {name} says {sizes[rank]} tokens for rank {rank}, which holds {tokens}")
    return sizes


def check_mask(op: str, name: str, mask: Tensor | None, like: Tensor, tokens: int | None = None) -> None:
    """``tokens`` None: as far as can be said without the other ranks."""
    if mask is None:
        return
    batch = like.shape[0]
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] != batch or tokens not in (None, mask.shape[1]):
        wanted = f"({batch}, {'tokens' if tokens is None else tokens})"
        raise ValueError(f"{op}: {name} must be {wanted} of bool, the tokens of all ranks, got {describe(mask)}")
    require_device(op, name, mask, like)


FACTS = (
    *("tokens", "batch", "heads", "head_dim", "dtype", "text tokens", "text_sizes", "text_q", "masks", "mask tokens"),
    *("sparse_n", "pattern"),
)


def describe_call(
    q: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_sizes: tuple[int, ...] | None,
    masks: Sequence[Tensor | None],
    sparse_n: int,
    pattern: str,
) -> dict[str, int]:
    """A call in integers: :data:`FACTS`, of which all but the tokens must be the same on all ranks."""
    text = -1 if text_k is None else text_k.shape[1] if text_sizes is None else sum(text_sizes)
    values = (
        q.shape[1],
        q.shape[0],
        q.shape[2],
        q.shape[3],
        DTYPES.index(q.dtype),
        text,
        -1 if text_sizes is None else zlib.crc32(repr(text_sizes).encode()),
        text_q is not None,
        sum(2**i for i, mask in enumerate(masks) if mask is not None),
        sum(mask.shape[-1] for mask in masks if mask is not None and mask.dim()),
        sparse_n,
        pattern == "group",
    )
    return dict(zip(FACTS, map(int, values), strict=True))


def agree(
    op: str, groups: Sequence[dist.ProcessGroup], refusal: str | None, facts: dict[str, int], device: torch.device
) -> list[dict[str, int]]:
    """The ``facts`` of all ranks, in the order of the last group, then of the one before.

    A rank that refuses its arguments says so here before it raises, so that none is left waiting.

    Raises:
        ValueError: this rank's ``refusal``, or that of another, or the ranks disagree.
    """
    rows = torch.tensor([[refusal is not None, *facts.values()]], dtype=torch.int64, device=device)
    for group in groups:
        arrived = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(arrived, rows, group=group)
        rows = torch.cat(arrived)
    if refusal is not None:
        raise ValueError(refusal)
    table = rows.tolist()
    if refused := [rank for rank, (failed, *_) in enumerate(table) if failed]:
        raise ValueError(f"{op}: the arguments of rank {', '.join(map(str, refused))} of the group were refused")
    for name, values in zip(FACTS[1:], [list(column) for column in zip(*table, strict=True)][2:], strict=True):
        if len(set(values)) > 1:
            told = [str(DTYPES[value]) for value in values] if name == "dtype" else values
            raise ValueError(f"{op}: {name} must be the same on all ranks, got {told}")
    return [dict(zip(FACTS, row, strict=True)) for _, *row in table]
