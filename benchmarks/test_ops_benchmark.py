# SPDX-License-Identifier: Apache-2.0
"""Every op and its original under pytest-benchmark, to compare two states of the code on one machine:

    pytest benchmarks --benchmark-autosave            # then, after a change
    pytest benchmarks --benchmark-compare

run.py is what figures for others come from: here candidates run one after the other, not in turns.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from vidgen import ops

sys.path.insert(0, str(Path(__file__).parent))
originals = importlib.import_module("originals")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(originals.ORIGINALS))
@pytest.mark.parametrize("which", ["ours", "original"])
def test_first_workload(benchmark, name, dtype, which):
    op = ops.OPS[name]
    args = next(iter(op.workloads(torch.device("cpu"), dtype).values()))()
    benchmark.group = f"{name} {dtype}"
    with torch.no_grad():
        step = originals.bind(originals.ORIGINALS[name], args) if which == "original" else lambda: op(*args)
        benchmark(step)
