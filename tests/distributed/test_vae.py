# SPDX-License-Identifier: Apache-2.0
"""Autoencoders over the ranks of a group: every result equals that of one process."""

import pytest

from .pool import Pool

TOLERANCE = 1e-5  # float32, of the largest value
RANKS = (1, 2, 3, 4)


def check(found: list[dict[int, float]]) -> None:
    assert max(max(errors.values()) for errors in found) <= TOLERANCE, found


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("system", "kind", "counts"),
    [
        ("wfvae", "encode", [1, 9, 17, 33, 41]),
        ("wfvae", "decode", [1, 2, 3, 4, 5, 7]),
        ("wfvae_4x8x8", "encode", [1, 5, 9, 13, 17, 29]),
        ("wfvae_4x8x8", "decode", [1, 2, 3, 4, 5, 7]),
        ("hunyuan", "encode", [1, 2, 4, 5, 6, 9, 11, 16, 17, 20, 29]),
        ("hunyuan", "decode", [1, 2, 3, 4, 5, 7]),
        ("cogvideox", "encode", [1, 2, 3, 5, 8, 9, 15, 16, 17, 25, 29, 49]),
        ("cogvideox", "decode", [1, 2, 3, 4, 5, 7, 8, 13]),
    ],
)
def test_frames_over_ranks(pool: Pool, system: str, kind: str, counts: list[int], ranks: int) -> None:
    check(pool.run("vae_cases.errors", ranks, system=system, kind=kind, counts=counts, batch=2 if ranks == 3 else 1))
