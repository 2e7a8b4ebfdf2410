# SPDX-License-Identifier: Apache-2.0
"""Skiparse group parallelism over real processes equals one process, and sends as little as it says."""

from typing import Any

import pytest

from vidgen.ops import context_parallel as cp

from .pool import Pool

CASES: dict[str, dict[str, Any]] = {
    "a group a rank": {"shape": (1, 16, 2, 4), "sparse_n": 4, "text": 3},
    "odd tokens": {"shape": (2, 29, 3, 4), "sparse_n": 4, "text": 5, "masked": True},
    "no text": {"shape": (2, 16, 3, 4), "sparse_n": 4},
    "more groups than ranks": {"shape": (2, 50, 3, 4), "sparse_n": 6, "text": 3},
    "fewer groups than ranks": {"shape": (2, 23, 3, 4), "sparse_n": 2, "text": 5, "masked": True},
    "fewer heads than a cell has ranks": {"shape": (2, 11, 1, 4), "sparse_n": 2, "text": 3},
    "text that is only read": {"shape": (2, 13, 3, 4), "sparse_n": 3, "text": 3, "text_queries": False},
    "groups without tokens": {"shape": (1, 2, 3, 4), "sparse_n": 4, "text": 2},
    "one group": {"shape": (2, 7, 3, 4), "sparse_n": 1, "text": 2},
}


def require_equal(replies: list[dict[str, float]]) -> None:
    for rank, errors in enumerate(replies):
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"


@pytest.mark.parametrize("pattern", ["single", "group"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(pool: Pool, name: str, ranks: int, pattern: str) -> None:
    require_equal(pool.run("group_parallel", ranks, pattern=pattern, **CASES[name]))


def test_any_strides(pool: Pool) -> None:
    require_equal(pool.run("group_parallel", 3, pattern="group", strided=True, **CASES["odd tokens"]))


@pytest.mark.parametrize("sparse_n", [2, 4])
def test_text_has_the_same_bits_on_all_ranks(pool: Pool, sparse_n: int) -> None:
    first, *others = pool.run("text_of_groups", 4, sparse_n=sparse_n)
    assert all(other == first for other in others)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("ratios", [[4, 4, 4], [1, 2, 4, 2, 1]])
def test_stream_moves_between_layers(pool: Pool, ratios: list[int], ranks: int) -> None:
    require_equal(pool.run("layers", ranks, tokens=37, ratios=ratios, text=5, masked=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_moves(pool: Pool, ranks: int) -> None:
    assert all(pool.run("moves", ranks, seed=ranks))


# Volume


def sent(pool: Pool, ranks: int, mode: str, **case: Any) -> tuple[float, float]:
    """Bytes of a rank forward and backward, on average."""
    counts = pool.run("volume", ranks, mode=mode, heads=6, dim=4, **case)
    return sum(f for f, _, _ in counts) / ranks, sum(b for _, b, _ in counts) / ranks


@pytest.mark.parametrize("ranks, sparse_n", [(2, 4), (2, 12), (3, 12), (4, 4), (4, 12)])
@pytest.mark.parametrize("text", [0, 12])
def test_volume_of_groups(pool: Pool, ranks: int, sparse_n: int, text: int) -> None:
    case = {"tokens": 1728 if ranks == 3 else 1152, "text": text, "sparse_n": sparse_n}
    formula = 4 * cp.group_parallel_volume(case["tokens"], 24, ranks, sparse_n, text)
    assert sent(pool, ranks, "group", **case) == (formula, formula)


def test_volume_of_cells(pool: Pool) -> None:
    formula = 4 * cp.group_parallel_volume(1152, 24, 4, 2, 12)
    forward, backward = sent(pool, 4, "group", tokens=1152, text=12, sparse_n=2)
    assert forward == backward == pytest.approx(formula, rel=0.1)  # a rank's run and its cell's groups overlap by luck


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_volume_of_ulysses_and_ring(pool: Pool, ranks: int) -> None:
    case = {"tokens": 120, "text": 12, "sparse_n": 1}
    whole, spread = (4 * cp.ulysses_volume(120, 24, ranks, 12, text_sharded=sharded) for sharded in (False, True))
    assert sent(pool, ranks, "ulysses", **case) == (whole, whole)
    assert sent(pool, ranks, "ulysses", shard_text=True, **case) == (spread, spread)
    forward, backward = sent(pool, ranks, "ring", **case)
    text = 4 * 24 * 12 * (ranks - 1) / ranks
    kv = 4 * cp.ring_volume(120, 24, ranks)
    assert (forward, backward) == (kv + text, kv + kv * ranks / (ranks - 1) + text)


@pytest.mark.parametrize("ranks", [2, 4])
def test_groups_send_a_quarter_of_ulysses(pool: Pool, ranks: int) -> None:
    video = {"tokens": 1152, "text": 0, "sparse_n": 4}
    for groups, ulysses in zip(sent(pool, ranks, "group", **video), sent(pool, ranks, "ulysses", **video), strict=True):
        assert groups == 0.25 * ulysses
    # As much text to a video as 512 tokens are to 36,864.
    joint = {"tokens": 1152, "text": 16, "sparse_n": 4}
    ulysses = sent(pool, ranks, "ulysses", shard_text=True, **joint)
    for groups, other in zip(sent(pool, ranks, "group", **joint), ulysses, strict=True):
        assert groups <= 0.35 * other


@pytest.mark.parametrize(
    "mode, text, shard_text, sparse_n, calls",
    [
        ("ulysses", 8, True, 1, 2),  # q, k and v in one, text with them
        ("ulysses", 8, False, 1, 2),
        ("group", 0, False, 4, 1),  # the move; none inside attention
        ("group", 8, False, 4, 3),  # the text's rows, summed and handed around
        ("group", 0, False, 2, 3),  # two ranks share a group
        ("ring", 0, False, 1, 3),
    ],
)
def test_exchanges_of_a_layer(pool: Pool, mode: str, text: int, shard_text: bool, sparse_n: int, calls: int) -> None:
    case = {"tokens": 64, "text": text, "sparse_n": sparse_n, "heads": 4, "dim": 4, "shard_text": shard_text}
    assert [reply[2] for reply in pool.run("volume", 4, mode=mode, **case)] == [calls] * 4


def test_groups_by_formula() -> None:
    width = 24 * 128
    assert cp.group_parallel_volume(36_864, width, 8, 8) == 0.25 * cp.ulysses_volume(36_864, width, 8)
    with_text = cp.group_parallel_volume(36_864, width, 8, 8, 512)
    assert with_text <= 0.35 * cp.ulysses_volume(36_864, width, 8)
    assert with_text <= 0.35 * cp.ulysses_volume(36_864, width, 8, 512)
