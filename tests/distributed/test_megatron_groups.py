# SPDX-License-Identifier: Apache-2.0
"""Layouts of a user's DeviceMesh and of Megatron's groups: the same groups, and models that equal one process."""

from typing import Any

import pytest
import torch

from vidgen.parallel.layout import with_groups

from .pool import Pool


def check(errors: dict[str, float], count: int) -> None:
    assert len(errors) > count
    assert {what: error for what, error in errors.items() if not error <= 1e-5} == {}


def test_a_mesh_with_some_dimensions(pool: Pool) -> None:
    found = pool.run("megatron_cases.from_mesh", 4, sizes={"shard": 2, "tensor": 2}, system="opensora_v2")
    for rank, result in enumerate(found):
        assert result["same"]  # the mesh's own groups
        assert result["sizes"] == {"pipeline": 1, "replicate": 1, "shard": 2, "ring": 1, "ulysses": 1, "tensor": 2}
        alone = {"pipeline", "replicate", "ring", "ulysses", "context"}
        assert all(result["groups"][name] == [rank] for name in alone)
        pair, row = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert result["groups"]["tensor"] == result["groups"]["sequence"] == pair
        assert result["groups"]["shard"] == result["groups"]["fsdp"] == result["groups"]["data"] == row
        check(result["errors"], 100)


@pytest.mark.parametrize(
    ("names", "part", "said"),
    [
        (("dp", "tp"), None, "must have dimensions of ('pipeline', 'replicate', 'shard', 'ring', 'ulysses', 'tensor')"),
        (("tensor", "ulysses"), None, "in this order, got ('tensor', 'ulysses')"),
        (("shard", "tensor"), "tensor", "must hold all 4 processes, got 2"),
    ],
)
def test_meshes_that_are_refused(pool: Pool, names: tuple[str, ...], part: str | None, said: str) -> None:
    assert all(said in text for text in pool.run("megatron_cases.from_other_mesh", 4, names=names, part=part))


MEGATRON: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, list[int]]]]] = {
    "tensor 2, context 2": (
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
        {"system": "opensora_plan_v1_5"},
        [{"tensor": [0, 1], "ulysses": [0, 2], "ring": [0]}, {"tensor": [2, 3], "ulysses": [1, 3], "ring": [3]}],
    ),
    "context 4, ulysses 2": (
        {"context_parallel_size": 4},
        {"ulysses": 2, "system": "opensora_plan_v1_3"},
        [{"ulysses": [0, 1], "ring": [0, 2]}, {"ulysses": [2, 3], "ring": [1, 3], "context": [0, 1, 2, 3]}],
    ),
    "hierarchical context 4": (
        {"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 2]},
        {},
        [{"ulysses": [0, 1], "ring": [0, 2]}, {"ulysses": [2, 3], "ring": [1, 3], "fsdp": [0, 1, 2, 3]}],
    ),
    "pipeline 2, data 2": (
        {"pipeline_model_parallel_size": 2},
        {},
        [{"pipeline": [0, 2], "shard": [0, 1]}, {"pipeline": [1, 3], "data": [2, 3]}],
    ),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_megatrons_groups(pool: Pool, name: str) -> None:
    pytest.importorskip("megatron.core")
    initialize, options, groups = MEGATRON[name]
    found = pool.run("megatron_cases.from_megatron", 4, initialize=initialize, **options)
    for rank, wanted in zip((0, 3), groups, strict=True):
        assert {dim: found[rank]["groups"][dim] for dim in wanted} == wanted
    for result in found:
        assert all(result["own"].values()), result["own"]
        assert ("levels" in result["own"]) == (name == "hierarchical context 4")
        if "system" in options:
            check(result["errors"], 60)


def test_what_megatron_cannot_give_is_refused(pool: Pool) -> None:
    pytest.importorskip("megatron.core")
    for missing, early in pool.run("megatron_cases.refused", 4):
        assert "pip install 'vidgen[megatron]'" in missing
        assert "call parallel_state.initialize_model_parallel first" in early


def test_another_order_of_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="must grow fastest along tensor, then along shard, got"):
        with_groups("cpu", torch.tensor([[0, 2], [1, 3]]), ("shard", "tensor"), {})
