# SPDX-License-Identifier: Apache-2.0
"""Transformers whose weights are cut over processes equal one process: outputs and gradients of all parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.parallel.tensor import order_of, tensor_problems

from .pool import Pool
from .tiny import make_model

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


@pytest.mark.parametrize("system", SYSTEMS)
def test_with_shards_and_recomputed_blocks(pool: Pool, system: str) -> None:
    parallel = {"tensor": 2} if system == "opensora_v2" else {"tensor": 2, "ulysses": 2}
    run(pool, system, parallel, members=4, fsdp=True, checkpointing=True)


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("opensora_plan_v1_3", {"preset": "tiny_i2v", "batch": 1, "masks": False, "latent": (1, 2, 6)}),
        ("opensora_plan_v1_5", {"changes": {"norm_cls": "layer_norm"}, "latent": (5, 4, 6), "text": 3}),
        ("opensora_v2", {"changes": {"fused_qkv": True, "qkv_bias": True}, "latent": (1, 4, 6)}),
        ("cogvideox", {"preset": "tiny-2b", "latent": (1, 8, 8)}),
    ],
)
def test_other_models(pool: Pool, system: str, options: dict[str, Any]) -> None:
    run(pool, system, {"tensor": 2}, **options)


# Tensors that MindSpeed-MM cuts in another way than we do, with weight and bias: they alone are gathered.
GATHERED = {"opensora_plan_v1_3": 2, "opensora_plan_v1_5": 0, "cogvideox": 2 * 2 * 2}


@pytest.mark.parametrize("system", SYSTEMS)
def test_rank_files(pool: Pool, system: str, tmp_path: Path) -> None:
    tensor = 4 if system == "opensora_plan_v1_3" else 2
    arguments = {"members": 4, "tensor": tensor, "changes": WIDE[system], "folder": str(tmp_path)}
    found = pool.run("tensor_cases.rank_files", 4, system=system, **arguments)
    for rank, result in enumerate(found):
        if system in GATHERED:  # the other one is written whole
            assert result.pop("gathered") == GATHERED[system]
        assert all(result[parts] for parts in ("same", "two", "whole")[: 3 - min(rank, 2)])


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 2, 2, 1], [2, 0, 1], [0, 0]])
def test_collectives_round_once(pool: Pool, sizes: list[int]) -> None:
    for dim in range(3):
        pool.run("tensor_cases.collectives", len(sizes), sizes=sizes, dim=dim)


def test_the_problems_of_a_cut() -> None:
    model = make_model("opensora_plan_v1_5", num_heads=6)
    assert tensor_problems(model, 1) == tensor_problems(model, 3) == []
    (problem,) = tensor_problems(model, 4)
    assert "tensor must divide the 6 heads of SparseUMMDiT, got 4; nearest: 3 or 6" in problem
    model.blocks[0].extra = torch.nn.Linear(2, 2)
    (problem,) = tensor_problems(model, 2)
    assert "must say how to cut every layer of its blocks, not ['transformer_blocks.0.0.extra']" in problem
    (problem,) = tensor_problems(torch.nn.Linear(2, 2), 2)
    assert "Linear has no plan of how to cut it, got tensor=2; nearest: tensor=1" in problem
    (problem,) = tensor_problems(make_model("opensora_v2", mlp_ratio=4.03125), 2)
    assert "tensor must divide the sections (129,) of double_blocks.0.img_mlp.0, got 2; nearest: 1" in problem


def test_a_fused_axis_is_reordered() -> None:
    order = order_of((4, 2), 2)
    assert order.tolist() == [0, 1, 4, 2, 3, 5]  # the first rank's share of both, then the second's
    assert order_of((6,), 3).tolist() == [0, 1, 2, 3, 4, 5]
