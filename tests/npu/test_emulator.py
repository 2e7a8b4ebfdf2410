# SPDX-License-Identifier: Apache-2.0
import pytest

from .worker import Worker


@pytest.mark.parametrize(
    "case",
    [
        "launch_outside_fails",
        "unknown_operator_raises",
        "memory_is_shared",
        "plain_operators",
        "attention_and_gradient",
        "ring_merge",
    ],
)
def test_emulator(npu: Worker, case: str) -> None:
    npu.run(f"cases_emulator.{case}")


def test_main_process_is_free_of_torch_npu(npu: Worker) -> None:
    import sys

    npu.run("cases_emulator.memory_is_shared")
    assert "torch_npu" not in sys.modules
