# SPDX-License-Identifier: Apache-2.0
"""Pipelines equal one process: losses, outputs and the gradients of all parameters."""

from __future__ import annotations

from typing import Any

import pytest

from .pool import Pool

SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
UNEVEN = {2: {6: [4, 2], 4: [3, 1]}, 4: {6: [0, 3, 2, 1], 4: [1, 2, 1, 0]}}  # by stages and blocks
VIRTUAL = {6: [[1, 2], [2, 1]], 4: [[1, 1], [1, 1]]}
CASES: dict[str, dict[str, Any]] = {}
for _system in SYSTEMS:
    _blocks = 6 if _system == "opensora_plan_v1_5" else 4
    CASES |= {
        f"{_system}, 2 stages": {
            "system": _system,
            "parallel": {"pipeline": 2, "stages": UNEVEN[2][_blocks]},
            "frames": (2, 3, 2),
            "recompute": True,
        },
        f"{_system}, 4 stages": {
            "system": _system,
            "parallel": {"pipeline": 4, "stages": UNEVEN[4][_blocks], "schedule": "gpipe"},
        },
        f"{_system}, virtual stages": {
            "system": _system,
            "parallel": {"pipeline": 2, "stages": VIRTUAL[_blocks]},
            "recompute": True,
        },
    }
CASES |= {
    "even, as many micro-batches as rounds of 2": {
        "system": "opensora_plan_v1_3",
        "parallel": {"pipeline": 2},
        "micro_batches": 4,
    },
    "fewer micro-batches than stages": {"system": "opensora_v2", "parallel": {"pipeline": 4}, "micro_batches": 2},
    "pipeline x fsdp": {
        "system": "opensora_plan_v1_5",
        "parallel": {"pipeline": 2, "shard": 2},
        "fsdp": True,
        "frames": (2, 3, 2),
    },
    "virtual stages x fsdp": {
        "system": "opensora_v2",
        "parallel": {"pipeline": 2, "shard": 2, "stages": VIRTUAL[4]},
        "fsdp": True,
        "recompute": True,
    },
    "pipeline x replicas": {
        "system": "cogvideox",
        "parallel": {"pipeline": 2, "replicate": 2, "stages": [1, 3]},
        "fsdp": True,
        "frames": (2, 2),
    },
    "pipeline x ulysses": {
        "system": "opensora_v2",
        "parallel": {"pipeline": 2, "ulysses": 2, "stages": [1, 3]},
        "frames": (2, 3, 2),
        "recompute": True,
    },
    "pipeline x ring x fsdp": {
        "system": "opensora_plan_v1_5",
        "parallel": {"pipeline": 2, "ring": 2},
        "fsdp": True,
    },
}


def check(pool: Pool, case: dict[str, Any]) -> list[dict[str, Any]]:
    parallel = case["parallel"]
    members = 1
    for name in ("pipeline", "shard", "replicate", "ring", "ulysses", "tensor"):
        members *= parallel.get(name, 1)
    found = pool.run("pipeline_cases.steps", 4, members=members, **case)[:members]
    for rank, errors in enumerate(found):
        facts = {name: errors.pop(name) for name in ("bytes", "names", "wrapped")}
        assert len(errors) > 4
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"
        errors |= facts
    # Together the stages hold every parameter once, each a part.
    shares = [errors["bytes"] for errors in found]
    copies = members // parallel["pipeline"] // (parallel.get("shard", 1) if case.get("fsdp") else 1)
    if case.get("fsdp"):
        copies = parallel.get("replicate", 1)
    assert max(shares) < 0.95
    assert abs(sum(shares) - copies) < 1e-3, shares
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(pool: Pool, name: str) -> None:
    check(pool, CASES[name])
