# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which tokens: arithmetic on integers, no communication."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..skiparse_index import require_pattern, require_ratio, skiparse_index

ORDERS = ("ulysses_inner", "ring_inner")


def shard_sizes(length: int, ranks: int, multiple: int = 1) -> tuple[int, ...]:
    """Lengths of contiguous shards, as even as they can be.

    All boundaries lie on multiples of ``multiple``; of units that are left over the first ranks get one each. A shard
    may be empty. ``shard_sizes(10, 4)`` is ``(3, 3, 2, 2)``, ``shard_sizes(10, 4, 4)`` is ``(4, 4, 2, 0)``.

    Raises:
        ValueError: a negative length, or fewer than one rank or than a multiple of 1.
    """
    if length < 0 or ranks < 1 or multiple < 1:
        raise ValueError(
            "shard_sizes: length must not be negative, ranks and multiple must be 1 or more, "
            f"got length={length}, ranks={ranks}, multiple={multiple}"
        )
    each, more = divmod(-(-length // multiple), ranks)
    ends = [min((rank * each + min(rank, more)) * multiple, length) for rank in range(ranks + 1)]
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def skiparse_multiple(ratios: Iterable[int]) -> int:
    """The ``multiple`` of :func:`shard_sizes` that suits every sparse ratio of a model: the least common multiple of
    their squares. Shards then begin where a round of groups begins, in single-skip and in group-skip."""
    ratios = list(ratios)
    for ratio in ratios:
        require_ratio("skiparse_multiple", ratio)
    return math.lcm(*(ratio**2 for ratio in ratios))


def starts(sizes: Iterable[int]) -> list[int]:
    """Where each shard begins, and where the last one ends."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return ends


def ring_blocks(ulysses: int, ring: int, order: str) -> list[list[int]]:
    """For each place of the ring, the shards that meet there: numbers in sequence order, in the order of Ulysses ranks.

    ``ulysses_inner`` (Megatron, yunchang) gives a Ulysses group consecutive shards, ``ring_inner`` (MindSpeed-MM's
    FSDP2 trainer) a ring.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if order == "ulysses_inner":
        return [[p * ulysses + u for u in range(ulysses)] for p in range(ring)]
    return [[u * ring + p for u in range(ulysses)] for p in range(ring)]


def misplaced_shard(sizes: tuple[int, ...], blocks: list[list[int]], sparse_n: int, pattern: str) -> int | None:
    """The first shard whose tokens would fall into other groups if its block were numbered from zero, or None."""
    unit = sparse_n if pattern == "single" else sparse_n**2
    begin = starts(sizes)
    for block in blocks:
        offset = 0
        for shard in block:
            if sizes[shard] and (begin[shard] - offset) % unit:
                return shard
            offset += sizes[shard]
    return None


# Placements: all tokens of a sequence, dealt to the ranks of a group.


@dataclass(frozen=True)
class Shards:
    """Contiguous runs of tokens: rank r holds ``sizes[r]`` of them."""

    sizes: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    def tokens(self, rank: int) -> Tensor:
        """The tokens of ``rank``, int64, in the order in which it holds them."""
        return _run_tokens(self.sizes)[rank]


@dataclass(frozen=True)
class Groups:
    """Whole Skiparse groups on each rank, or on a cell of ranks where there are fewer groups than ranks.

    The ranks form ``cells`` cells of ``ulysses`` consecutive ranks: as many as divide the ranks evenly without
    outnumbering the groups. A cell holds consecutive groups, one after the other, and each of its ranks a run of
    these tokens.

    Raises:
        ValueError: a negative length, a ratio below 1, an unknown pattern or no ranks.
    """

    num_tokens: int
    sparse_n: int
    pattern: str
    ranks: int

    def __post_init__(self) -> None:
        require_pattern("Groups", self.sparse_n, self.pattern)
        if self.num_tokens < 0 or self.ranks < 1:
            raise ValueError(
                f"Groups: num_tokens must not be negative and ranks must be 1 or more, got {self.num_tokens} and "
                f"{self.ranks}"
            )

    @property
    def cells(self) -> int:
        return max(n for n in range(1, self.ranks + 1) if self.ranks % n == 0 and n <= self.sparse_n)

    @property
    def ulysses(self) -> int:
        """Ranks of a cell."""
        return self.ranks // self.cells

    def members(self, rank: int) -> range:
        """The ranks of the cell of ``rank``."""
        first = rank - rank % self.ulysses
        return range(first, first + self.ulysses)

    def group_lengths(self, rank: int) -> tuple[int, ...]:
        """Tokens of each group of the cell of ``rank``."""
        first = starts(shard_sizes(self.sparse_n, self.cells))
        cell = rank // self.ulysses
        return _group_lengths(self.num_tokens, self.sparse_n, self.pattern)[first[cell] : first[cell + 1]]

    def tokens(self, rank: int) -> Tensor:
        """The tokens of ``rank``, int64, in the order in which it holds them."""
        return _group_tokens(self)[rank]


Placement = Shards | Groups


# What is kept must serve training too, also when sampling asked for it first.


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _run_tokens(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.arange(sum(sizes), device="cpu").split(list(sizes))


@lru_cache(maxsize=64)
def _group_lengths(num_tokens: int, sparse_n: int, pattern: str) -> tuple[int, ...]:
    group, _ = skiparse_index(num_tokens, sparse_n, pattern, device="cpu")
    return tuple(group.bincount(minlength=sparse_n).tolist())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _group_tokens(placement: Groups) -> tuple[Tensor, ...]:
    group, _ = skiparse_index(placement.num_tokens, placement.sparse_n, placement.pattern, device="cpu")
    by_group = group.argsort(stable=True)  # the position inside a group grows with the token
    sizes: list[int] = []
    for rank in range(0, placement.ranks, placement.ulysses):
        sizes += shard_sizes(sum(placement.group_lengths(rank)), placement.ulysses)
    return by_group.split(sizes)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def route(source: Placement, target: Placement, rank: int) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """How ``rank`` gets from one placement to another.

    Returns ``(pick, sent, place, received)``: it sends its rows ``pick``, of which the first ``sent[0]`` go to rank 0
    and so on, and its new rows are ``place`` among those that arrive, ``received[i]`` of them from rank i.
    """
    new_owner = torch.empty(source.num_tokens, dtype=torch.int64, device="cpu")
    for other in range(target.ranks):
        new_owner[target.tokens(other)] = other
    goes_to = new_owner[source.tokens(rank)]
    pick = goes_to.argsort(stable=True)
    sent = goes_to.bincount(minlength=target.ranks).tolist()
    arriving = [t[new_owner[t] == rank] for t in (source.tokens(other) for other in range(source.ranks))]
    row = torch.empty(source.num_tokens, dtype=torch.int64, device="cpu")
    row[torch.cat(arriving)] = torch.arange(sum(map(len, arriving)), device="cpu")
    return pick, sent, row[target.tokens(rank)], list(map(len, arriving))
