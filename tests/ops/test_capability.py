# SPDX-License-Identifier: Apache-2.0
"""Which variant of the kernels runs: PyTorch's choice, which ATEN_CPU_CAPABILITY limits."""

import os
import subprocess
import sys

import pytest
import torch

from vidgen import ops

SETS = ["DEFAULT", "AVX2", "AVX512", "AVX512_BF16"]


def capability(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    command = [sys.executable, "-c", "from vidgen import ops; print(ops.cpu_capability())"]
    return subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_unlimited_it_is_pytorchs_or_more(native):
    best, torchs = capability(), torch.backends.cpu.get_cpu_capability()
    assert best in SETS and best in native.build_info()["capabilities"].split()
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        assert best == ops.cpu_capability() and best.startswith(torchs)


@pytest.mark.parametrize("limit", ["default", "avx2", "avx512"])
def test_a_limit_is_obeyed(limit, native):
    chosen = capability(ATEN_CPU_CAPABILITY=limit)
    assert chosen in SETS[: SETS.index(limit.upper()) + 1]


def test_without_the_library_it_is_pytorchs():
    unlimited = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    torchs = subprocess.run([sys.executable, "-c", code], env=unlimited, capture_output=True, text=True).stdout.strip()
    assert capability(VIDGEN_NATIVE="0") == torchs
