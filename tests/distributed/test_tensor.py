# SPDX-License-Identifier: Apache-2.0
"""Transformers whose weights are cut over processes equal one process: outputs and gradients of all parameters."""

from typing import Any

import pytest

from .pool import Pool

SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
WIDE: dict[str, dict[str, Any]] = {  # four heads
    "opensora_plan_v1_3": {"num_attention_heads": 4},
    "opensora_plan_v1_5": {"num_heads": 4},
    "opensora_v2": {"hidden_size": 64, "num_heads": 4},
    "cogvideox": {"num_attention_heads": 4},
}
PARALLEL: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor": 2},
    "tensor 4": {"tensor": 4},
    "tensor 2, ulysses 2": {"tensor": 2, "ulysses": 2},
    "tensor 2, ring 2": {"tensor": 2, "ring": 2},
}


def run(pool: Pool, system: str, parallel: dict[str, Any], **options: Any) -> None:
    members = options.pop("members", parallel.get("ulysses", 1) * parallel.get("ring", 1) * parallel["tensor"])
    arguments = {"system": system, "members": members, "parallel": parallel, **options}
    found = pool.run("tensor_cases.model", 4, **arguments)
    for rank, errors in enumerate(found[:members]):
        assert len(errors) > 20
        assert errors.pop("share") == 1 / parallel["tensor"]
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("system", SYSTEMS)
def test_equals_one_process(pool: Pool, system: str, name: str) -> None:
    changes = WIDE[system] if PARALLEL[name]["tensor"] == 4 else {}
    run(pool, system, PARALLEL[name], changes=changes)
