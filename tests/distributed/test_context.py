# SPDX-License-Identifier: Apache-2.0
"""Transformers with their tokens over processes equal one process: outputs and gradients of all parameters."""

from typing import Any

import pytest

from .pool import Pool

PARALLEL: dict[str, dict[str, Any]] = {
    "ulysses 2": {"ulysses": 2},
    "ulysses 4": {"ulysses": 4},
    "ring 4": {"ring": 4},
    "double ring 4": {"ring": 4, "window": 2},
    "usp 2x2": {"ulysses": 2, "ring": 2},
    "usp 2x2, ring inner": {"ulysses": 2, "ring": 2, "order": "ring_inner"},
    "groups 2": {"ulysses": 2, "skiparse": "groups"},
    "groups 4": {"ulysses": 4, "skiparse": "groups"},
}
SPARSE = {"opensora_plan_v1_3", "opensora_plan_v1_5"}
CASES = [
    (system, name)
    for system in ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
    for name in PARALLEL
    if system in SPARSE or not name.startswith("groups")
]


def run(pool: Pool, system: str, name: str, **options: Any) -> None:
    parallel = dict(PARALLEL[name])
    skiparse = parallel.pop("skiparse", "heads")
    found = pool.run("context_cases.model", 4, system=system, parallel=parallel, skiparse=skiparse, **options)
    for rank, errors in enumerate(found):
        assert len(errors) > 20
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"


@pytest.mark.parametrize(("system", "name"), CASES)
def test_equals_one_process(pool: Pool, system: str, name: str) -> None:
    run(pool, system, name)


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("opensora_plan_v1_3", {"preset": "tiny_i2v", "batch": 1, "masks": False}),
        ("opensora_plan_v1_5", {"checkpointing": True, "latent": (5, 4, 6), "text": 3}),
        ("opensora_v2", {"preset": "tiny_i2v", "checkpointing": True, "latent": (1, 4, 6)}),
        ("cogvideox", {"preset": "tiny-2b", "latent": (1, 8, 8)}),
        ("cogvideox", {"preset": "tiny-5b-i2v", "checkpointing": True}),
    ],
)
def test_other_models_and_recomputed_blocks(pool: Pool, system: str, options: dict[str, Any]) -> None:
    run(pool, system, "usp 2x2", **options)
