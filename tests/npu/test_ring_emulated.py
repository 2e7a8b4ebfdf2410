# SPDX-License-Identifier: Apache-2.0
"""Verification rung 4: what attention says about its softmax lets a ring of processes on the emulated npu merge parts.

The messages are gloo's: nothing is said about Ascend's own communication.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import environment
from .conftest import need

RANKS = 2
RINGS = {"ring", "ring of unequal shards", "ring with masks and text", "single-skip ring with text", "group-skip ring"}


def test_processes_equal_one(tmp_path: Path) -> None:
    need("torch_npu")
    command = [sys.executable, "-m", "tests.npu.ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(tmp_path / "store")],
            env=environment.torch_npu(),
            stdout=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]
    answers = [process.communicate(timeout=600)[0] for process in processes]
    assert not any(process.returncode for process in processes), "a rank failed; what it said is in the output"
    problems = []
    for rank, answer in enumerate(answers):
        found = json.loads(answer)
        assert found.keys() == RINGS | {"ulysses", "ulysses with text"}
        problems += [f"{name}, rank {rank}: {problem}" for name, case in found.items() for problem in check(name, case)]
    assert not problems, "\n".join(problems)


def check(name: str, case: dict[str, Any]) -> list[str]:
    calls, errors = case["npu"], case["errors"]
    problems = [f"error of {what} is {error}" for what, error in errors.items() if not error <= 1e-5]
    if not {"out", "grad of q", "grad of k", "grad of v"} <= errors.keys():
        problems.append(f"only {sorted(errors)} were compared")
    parts = RANKS + ("text" in name) if name in RINGS else 1
    merges = calls.get("npu::npu_ring_attention_update", 0)
    if (
        merges != parts - 1
        or not calls["npu::npu_fusion_attention"] == calls["npu::npu_fusion_attention_grad"] == parts
    ):
        problems.append(f"expected {parts} parts, got {calls}")
    return problems
