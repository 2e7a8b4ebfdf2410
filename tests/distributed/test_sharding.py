# SPDX-License-Identifier: Apache-2.0
"""FSDP2, HSDP and the optimizer that is sharded over replicas too: the same as one process."""

from typing import Any

import pytest
import torch

from .pool import Pool
from .tiny import SYSTEMS, make_model

# Processes, and sizes.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp 2": (2, {}),
    "fsdp 4": (4, {}),
    "hsdp 2x2": (4, {"replicate": 2}),
    "hsdp 2x2, accumulation": (4, {"replicate": 2, "accumulation": 2}),
}


def check(found: list[dict[str, float] | None], members: int, tolerance: float = 1e-5) -> None:
    assert [each is None for each in found] == [rank >= members for rank in range(len(found))]
    for rank, each in enumerate(found[:members]):
        assert each is not None
        wrong = {name: value for name, value in each.items() if not value <= tolerance and name != "bytes"}
        assert not wrong, (rank, each)


# The default suite has each layout and each system once.
CASES = [
    pytest.param(system, layout, marks=[] if i == j else pytest.mark.slow)
    for i, system in enumerate(SYSTEMS)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize("system, layout", CASES)
def test_three_steps_equal_one_process(pool: Pool, system: str, layout: str) -> None:
    members, options = LAYOUTS[layout]
    found = pool.run("sharding_cases.three_steps", 4, system=system, members=members, **options)
    check(found, members)
    shares = [each["bytes"] for each in found if each is not None]
    assert sum(shares) == pytest.approx(1)  # nothing is kept twice
    assert max(shares) < 1.1 / members  # small parameters cannot be cut evenly


def test_variants(pool: Pool) -> None:
    """Accumulation under FSDP alone, recomputed activations, parameters kept after forward, and the optimizer whole."""
    run = "sharding_cases.three_steps"
    check(pool.run(run, 4, system="opensora_v2", members=4, accumulation=2, recompute=True), 4)
    kept = {"reshard_after_forward": False, "cpu_offload": True}
    check(pool.run(run, 4, system="cogvideox", members=2, replicate=2, options=kept), 2)


def test_bfloat16(pool: Pool) -> None:
    """Computed in bfloat16 from float32 shards; the reference has bfloat16 weights beside a float32 master copy."""
    found = pool.run("sharding_cases.three_steps", 4, system="opensora_plan_v1_5", members=2, dtype="bfloat16")
    check(found, 2, tolerance=0.05)
    assert found[0]["loss"] < 0.01


@pytest.mark.parametrize("system", [*SYSTEMS[:1], *(pytest.param(s, marks=pytest.mark.slow) for s in SYSTEMS[1:])])
def test_every_block_is_sharded_by_itself(pool: Pool, system: str) -> None:
    number = len(list(make_model(system).blocks))
    for found in pool.run("sharding_cases.placed", 4, system=system):
        assert found["modules"] == number + 1 and found["blocks"] == number > 1
        assert found["mesh"] == ("replicate", "shard")
        assert found["restored"] and found["steps"] == 2


def test_gradients_of_tensor_ranks(pool: Pool) -> None:
    for found in pool.run("sharding_cases.tensor_sums", 4):
        assert max(found.values()) < 1e-4, found


def test_models_without_blocks_are_cut_by_their_lists() -> None:
    from vidgen.parallel.sharding import blocks_of

    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleList([inner, inner]), "b": torch.nn.Linear(1, 1)})
    assert blocks_of(model) == [inner]  # one module in two places is one
    assert blocks_of(torch.nn.Linear(1, 1)) == []
