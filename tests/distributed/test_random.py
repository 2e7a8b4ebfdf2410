# SPDX-License-Identifier: Apache-2.0
"""Cases drawn at random, over all modes and options together."""

from random import Random
from typing import Any

import pytest

from .pool import Pool


def draw(random: Random) -> tuple[str, int, dict[str, Any]]:
    ranks, sparse_n = random.choice((2, 3, 4)), random.choice((1, 1, 2, 3, 4))
    text = random.choice((0, 1, 2, 5, 9))
    shape = (random.choice((1, 2)), random.choice((1, 3, 8, 17, 40, 61)), random.choice((1, 2, 3, 5)), 4)
    options: dict[str, Any] = {"shape": shape, "sparse_n": sparse_n, "pattern": random.choice(("single", "group"))}
    options.update(text=text, text_queries=random.random() < 0.7, masked=random.random() < 0.5)
    mode = random.choice(("ulysses", "ring", "ulysses_inner", "ring_inner", "groups"))
    if mode == "groups":
        return "group_parallel", ranks, options
    options.update(mode=mode, shard_text=bool(text) and random.random() < 0.5, tell_sizes=random.random() < 0.7)
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    if mode.endswith("inner"):
        options["inner"] = random.choice(divisors)
    if mode == "ring":
        options["window"] = random.choice(divisors)
    if mode == "ulysses" or sparse_n == 1:  # any shards, in whichever order
        cuts = sorted(random.choices(range(shape[1] + 1), k=ranks - 1))
        options["sizes"] = tuple(b - a for a, b in zip([0, *cuts], [*cuts, shape[1]], strict=True))
    return "attention", ranks, options


def run(pool: Pool, seeds: range) -> None:
    for seed in seeds:
        case, ranks, options = draw(Random(seed))
        for rank, errors in enumerate(pool.run(case, ranks, **options)):
            for what, error in errors.items():
                assert error <= 1e-5, f"seed {seed}, {options}: {what} on rank {rank} of {ranks}: {error}"


def test_random_cases(pool: Pool) -> None:
    run(pool, range(60))


@pytest.mark.slow
def test_many_random_cases(pool: Pool) -> None:
    run(pool, range(100, 1500))
