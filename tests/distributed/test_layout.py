# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of who holds what; no processes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.ops import context_parallel as cp
from vidgen.ops import skiparse_index
from vidgen.ops.context_parallel.layout import misplaced_shard, ring_blocks, route

RANKS, RATIOS, PATTERNS = st.integers(1, 8), st.integers(1, 9), st.sampled_from(["single", "group"])
without_deadline = settings(max_examples=60, deadline=None)


@without_deadline
@given(st.integers(0, 500), RANKS, st.integers(1, 20))
def test_shards_are_even_and_aligned(length: int, ranks: int, multiple: int) -> None:
    sizes = cp.shard_sizes(length, ranks, multiple)
    assert len(sizes) == ranks and sum(sizes) == length and min(sizes) >= 0
    ends = [sum(sizes[:i]) for i in range(ranks + 1)]
    assert all(end % multiple == 0 or end == length for end in ends)
    units = [-(-size // multiple) for size in sizes]
    assert max(units) - min(units) <= 1 and units == sorted(units, reverse=True)


def test_shards_by_example() -> None:
    assert cp.shard_sizes(10, 4) == (3, 3, 2, 2)
    assert cp.shard_sizes(10, 4, 4) == (4, 4, 2, 0)
    assert cp.shard_sizes(0, 3) == (0, 0, 0)
    assert cp.skiparse_multiple([1, 2, 4, 8, 4, 2, 1]) == 64
    assert cp.skiparse_multiple([2, 3]) == 36


@without_deadline
@given(st.integers(0, 300), RANKS, RATIOS, PATTERNS)
def test_aligned_shards_keep_their_groups(length: int, ranks: int, ratio: int, pattern: str) -> None:
    """A shard numbered from zero falls into the groups of the whole sequence, and no shard is called misplaced."""
    sizes = cp.shard_sizes(length, ranks, cp.skiparse_multiple([ratio]))
    whole, _ = skiparse_index(length, ratio, pattern)
    for part in whole.split(list(sizes)):
        assert torch.equal(part, skiparse_index(len(part), ratio, pattern)[0])
    for order in ("ulysses_inner", "ring_inner"):
        for ulysses in (n for n in range(1, ranks + 1) if ranks % n == 0):
            blocks = ring_blocks(ulysses, ranks // ulysses, order)
            assert misplaced_shard(sizes, blocks, ratio, pattern) is None
            for block in blocks:
                tokens = torch.cat([whole.split(list(sizes))[shard] for shard in block])
                assert torch.equal(tokens, skiparse_index(len(tokens), ratio, pattern)[0])


@without_deadline
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), RATIOS, PATTERNS)
def test_misplaced_shards_are_found(sizes: list[int], ratio: int, pattern: str) -> None:
    whole, _ = skiparse_index(sum(sizes), ratio, pattern)
    parts = whole.split(sizes)
    kept = [torch.equal(part, skiparse_index(len(part), ratio, pattern)[0]) for part in parts]
    wrong = misplaced_shard(tuple(sizes), ring_blocks(1, len(sizes), "ulysses_inner"), ratio, pattern)
    # A short shard may keep its groups by luck; one that does not is found.
    assert wrong is None or sum(sizes[:wrong]) % (ratio if pattern == "single" else ratio**2)
    assert all(kept) or wrong is not None


def test_blocks_of_both_orders() -> None:
    assert ring_blocks(2, 3, "ulysses_inner") == [[0, 1], [2, 3], [4, 5]]
    assert ring_blocks(2, 3, "ring_inner") == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="order must be one of"):
        ring_blocks(2, 3, "outer")


@without_deadline
@given(st.integers(0, 300), RATIOS, PATTERNS, RANKS)
def test_groups_are_whole_and_complete(length: int, ratio: int, pattern: str, ranks: int) -> None:
    placement = cp.Groups(length, ratio, pattern, ranks)
    assert ranks % placement.cells == 0 and placement.cells <= ratio
    assert placement.cells == ranks or ratio < ranks
    group, position = skiparse_index(length, ratio, pattern)
    seen = []
    for rank in range(0, ranks, placement.ulysses):
        members = placement.members(rank)
        assert members == range(rank, rank + placement.ulysses)
        tokens = torch.cat([placement.tokens(member) for member in members])
        assert len(tokens) == sum(placement.group_lengths(rank))
        for run in tokens.split(list(placement.group_lengths(rank))):
            assert len(group[run].unique()) <= 1  # one group in each run ...
            assert torch.equal(position[run], position[run].sort().values)  # ... in its order
            assert len(run) == 0 or len(run) == int((group == group[run[0]]).sum())  # and all of it
        seen.append(tokens)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(length))


@without_deadline
@given(st.integers(0, 200), st.tuples(RATIOS, RATIOS), st.tuples(PATTERNS, PATTERNS), RANKS)
def test_routes_deliver(length: int, ratios: tuple[int, int], patterns: tuple[str, str], ranks: int) -> None:
    """Play the exchange in one process."""
    source, target = (cp.Groups(length, k, p, ranks) for k, p in zip(ratios, patterns, strict=True))
    routes = [route(source, target, rank) for rank in range(ranks)]
    boxes = [source.tokens(rank)[pick].split(sent) for rank, (pick, sent, _, _) in enumerate(routes)]
    for rank, (_, _, place, received) in enumerate(routes):
        assert [len(boxes[other][rank]) for other in range(ranks)] == received
        arrived = torch.cat([boxes[other][rank] for other in range(ranks)])
        assert torch.equal(arrived[place], target.tokens(rank))


@pytest.mark.parametrize("ranks, ratio", [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (3, 3)])
def test_between_patterns_each_rank_keeps_its_share(ranks: int, ratio: int) -> None:
    length = 4 * ratio**2
    single, group = (cp.Groups(length, ratio, pattern, ranks) for pattern in ("single", "group"))
    for rank in range(ranks):
        _, sent, _, _ = route(single, group, rank)
        assert sent == [length // ranks**2] * ranks


def test_what_sampling_asked_for_serves_training() -> None:
    placement = cp.Groups(17, 3, "group", 2)
    with torch.inference_mode():
        tokens = placement.tokens(1)
    table = torch.randn(17, 4, requires_grad=True)
    table[tokens].square().sum().backward()
    assert math.isfinite(table.grad.sum().item())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: cp.shard_sizes(-1, 2), "length must not be negative"),
        (lambda: cp.shard_sizes(4, 0), "ranks and multiple must be 1 or more"),
        (lambda: cp.skiparse_multiple([0]), "sparse_n must be 1 or more"),
        (lambda: cp.Groups(4, 0, "single", 2), "sparse_n must be 1 or more"),
        (lambda: cp.Groups(4, 2, "double", 2), "pattern must be one of"),
        (lambda: cp.Groups(-4, 2, "single", 2), "num_tokens must not be negative"),
        (lambda: cp.Groups(4, 2, "single", 0), "ranks must be 1 or more"),
    ],
)
def test_refusals(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
