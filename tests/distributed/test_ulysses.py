# SPDX-License-Identifier: Apache-2.0
"""Ulysses attention over real processes equals one process, forward and backward."""

from typing import Any

import pytest

from .pool import Pool

CASES: dict[str, dict[str, Any]] = {
    "plain": {"shape": (1, 12, 4, 8)},
    "odd tokens and heads": {"shape": (2, 11, 5, 6)},
    "fewer heads than ranks": {"shape": (2, 9, 2, 4), "text": 3},
    "fewer tokens than ranks": {"shape": (1, 2, 3, 4)},
    "any shards": {"shape": (2, 13, 3, 4), "sizes": "uneven"},
    "sizes told by the ranks": {"shape": (2, 7, 3, 4), "tell_sizes": False, "text": 5, "masked": True},
    "mask": {"shape": (2, 10, 3, 4), "masked": True},
    "text on each rank": {"shape": (2, 10, 3, 4), "text": 5, "masked": True},
    "text over the ranks": {"shape": (2, 10, 3, 4), "text": 5, "shard_text": True, "masked": True},
    "text that is only read": {"shape": (2, 7, 3, 4), "text": 3, "text_queries": False},
    "sharded text that is only read": {"shape": (1, 7, 4, 4), "text": 6, "text_queries": False, "shard_text": True},
    "single-skip": {"shape": (2, 11, 3, 4), "sparse_n": 2, "text": 3, "masked": True},
    "group-skip": {"shape": (2, 23, 3, 4), "sparse_n": 3, "pattern": "group", "text": 4, "shard_text": True},
    "group-skip without text": {"shape": (1, 17, 4, 4), "sparse_n": 2, "pattern": "group"},
}
UNEVEN = {1: (13,), 2: (9, 4), 3: (1, 12, 0), 4: (0, 5, 7, 1)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(pool: Pool, name: str, ranks: int) -> None:
    case = dict(CASES[name])
    if case.get("sizes") == "uneven":
        case["sizes"] = UNEVEN[ranks]
    for rank, errors in enumerate(pool.run("attention", ranks, mode="ulysses", **case)):
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"
