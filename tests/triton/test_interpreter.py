# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of every Triton kernel against the reference, in Triton's interpreter, without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidgen.ops._backends import triton as backend

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(autouse=True)
def triton():
    if importlib.util.find_spec("triton") is None:
        missing = "triton is not installed (make setup installs it where it exists)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.mark.parametrize("op", sorted(backend.MODULES, reverse=True))  # the longest first
def test_battery_in_the_interpreter(op):
    settings = {"TRITON_INTERPRET": "1", "VIDGEN_NATIVE": "0", "OMP_NUM_THREADS": "1", "OP": op}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    for inherited in ("VIDGEN_STRICT", "VIDGEN_BACKEND", "PYTEST_ADDOPTS"):
        environment.pop(inherited, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(HERE / "one_op.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
