# SPDX-License-Identifier: Apache-2.0
"""Verification rung 4: what attention says about its softmax lets a ring of processes on the emulated npu merge parts.

The messages are gloo's: nothing is said about Ascend's own communication.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from . import environment
from .conftest import need

RANKS = 2
RINGS = ["ring", "ring of unequal shards", "ring with masks and text", "single-skip ring with text", "group-skip ring"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    need("torch_npu")
    store = tmp_path_factory.mktemp("store") / "file"
    command = [sys.executable, "-m", "tests.npu.ranks"]
    processes = [
        subprocess.Popen([*command, str(rank), str(RANKS), str(store)], env=environment.torch_npu(), stdout=-1)
        for rank in range(RANKS)
    ]
    answers = [process.communicate(timeout=180)[0] for process in processes]
    assert not any(process.returncode for process in processes), "a rank failed; what it said is in the output"
    return [json.loads(answer) for answer in answers]


@pytest.mark.parametrize("name", [*RINGS, "ulysses", "ulysses with text"])
def test_processes_equal_one(found: list[dict[str, Any]], name: str) -> None:
    for rank, cases in enumerate(found):
        errors, calls = cases[name]["errors"], cases[name]["npu"]
        wrong = {what: error for what, error in errors.items() if not error <= 1e-5}
        assert errors and not wrong, f"rank {rank}: {wrong}"
        assert calls["npu::npu_fusion_attention"] and calls["npu::npu_fusion_attention_grad"]
        if name in RINGS:
            # the text is one more part
            assert calls["npu::npu_ring_attention_update"] == (RANKS if "text" in name else RANKS - 1), calls
