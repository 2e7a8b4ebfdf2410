# SPDX-License-Identifier: Apache-2.0
"""Ring attention, and Ulysses times ring, over real processes equal one process, forward and backward."""

from typing import Any

import pytest

from .pool import Pool

CASES: dict[str, dict[str, Any]] = {
    "plain": {"shape": (1, 12, 4, 8)},
    "odd tokens and heads": {"shape": (2, 11, 3, 6)},
    "fewer tokens than ranks": {"shape": (1, 2, 3, 4), "text": 1},
    "any shards": {"shape": (2, 13, 3, 4), "sizes": "uneven"},
    "sizes told by the ranks": {"shape": (2, 7, 3, 4), "tell_sizes": False, "text": 5, "masked": True},
    "mask": {"shape": (2, 10, 3, 4), "masked": True},
    "text on each rank": {"shape": (2, 10, 3, 4), "text": 5, "masked": True},
    "text over the ranks": {"shape": (2, 10, 3, 4), "text": 5, "shard_text": True, "masked": True},
    "text that is only read": {"shape": (2, 7, 3, 4), "text": 3, "text_queries": False},
    "single-skip": {"shape": (2, 15, 3, 4), "sparse_n": 2, "text": 3, "masked": True},
    "group-skip": {"shape": (2, 43, 3, 4), "sparse_n": 3, "pattern": "group", "text": 4, "shard_text": True},
    "group-skip without text": {"shape": (1, 17, 4, 4), "sparse_n": 2, "pattern": "group"},
}
UNEVEN = {1: (13,), 2: (9, 4), 3: (1, 12, 0), 4: (0, 5, 7, 1)}


def require_equal(pool: Pool, ranks: int, **case: Any) -> None:
    if case.get("sizes") == "uneven":
        case["sizes"] = UNEVEN[ranks]
    require_small(pool.run("attention", ranks, **case))


def require_small(replies: list[dict[str, float]]) -> None:
    for rank, errors in enumerate(replies):
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_ring(pool: Pool, name: str, ranks: int) -> None:
    require_equal(pool, ranks, mode="ring", **CASES[name])


@pytest.mark.parametrize("ranks, window", [(2, 2), (3, 3), (4, 2), (4, 4)])
@pytest.mark.parametrize("name", ["odd tokens and heads", "any shards", "text on each rank", "group-skip"])
def test_ring_of_rings(pool: Pool, name: str, ranks: int, window: int) -> None:
    require_equal(pool, ranks, mode="ring", window=window, **CASES[name])


@pytest.mark.parametrize("order", ["ulysses_inner", "ring_inner"])
@pytest.mark.parametrize("name", CASES)
def test_ulysses_times_ring(pool: Pool, name: str, order: str) -> None:
    require_equal(pool, 4, mode=order, inner=2, **CASES[name])


@pytest.mark.parametrize("order", ["ulysses_inner", "ring_inner"])
@pytest.mark.parametrize("ranks, inner", [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 4)])
def test_one_of_the_two_is_one(pool: Pool, ranks: int, inner: int, order: str) -> None:
    require_equal(pool, ranks, mode=order, inner=inner, **CASES["text on each rank"])
    require_equal(pool, ranks, mode=order, inner=inner, **CASES["group-skip"])


@pytest.mark.parametrize("mode, inner", [("ulysses", 1), ("ring", 1), ("ring_inner", 2)])
@pytest.mark.parametrize("name", ["plain", "text over the ranks", "group-skip"])
def test_any_strides(pool: Pool, name: str, mode: str, inner: int) -> None:
    require_equal(pool, 4, mode=mode, inner=inner, strided=True, **CASES[name])


@pytest.mark.parametrize("dtype, most", [("float64", 1e-12), ("bfloat16", 0.04), ("float16", 0.005)])
@pytest.mark.parametrize("mode, inner", [("ulysses", 1), ("ring", 1), ("ulysses_inner", 2), ("groups", 1)])
def test_other_dtypes(pool: Pool, mode: str, inner: int, dtype: str, most: float) -> None:
    case = {"shape": (2, 34, 3, 8), "sparse_n": 4, "pattern": "group", "text": 5, "dtype": dtype}
    if mode == "groups":
        replies = pool.run("group_parallel", 4, **case)
    else:
        replies = pool.run("attention", 4, mode=mode, inner=inner, relative=True, **case)
    assert max(error for errors in replies for error in errors.values()) <= most


def test_more_queries_than_a_block_of_the_backward_pass(pool: Pool) -> None:
    require_equal(pool, 2, mode="ring", shape=(1, 2100, 1, 4), masked=True, relative=True)


def test_hops_between_windows_in_their_own_group(pool: Pool) -> None:
    require_small(pool.run("second_group", 4))


@pytest.mark.parametrize("ranks, window", [(2, 1), (3, 3), (4, 1), (4, 2), (4, 4)])
def test_exchange_runs_while_blocks_are_computed(pool: Pool, ranks: int, window: int) -> None:
    for events in pool.run("overlap", ranks, window=window):
        forward = [hops for name, hops in events if name == "forward"]
        backward = [hops for name, hops in events if name == "backward"]
        assert len(forward) == len(backward) == ranks
        assert min(forward[:-1]) >= 1 and forward[-1] == 0  # the last block has nothing behind it
        assert backward[0] >= 1 and min(backward[1:]) >= 1  # gradients follow, to the last block
        assert min(backward[1:-1], default=2) >= 2  # keys and gradients at the same time


def test_sampling_on_groups_of_a_device_mesh(pool: Pool) -> None:
    require_small(pool.run("sampling", 4))
