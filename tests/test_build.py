# SPDX-License-Identifier: Apache-2.0
"""The build says what it did and why not; a library that does not fit is refused, never a crash."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidgen import ops

ROOT = Path(__file__).parent.parent
BATTERY = ROOT / "tests" / "ops" / "test_all_ops.py"


def build(**environment):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def run(code, package=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(package), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=package, capture_output=True, text=True)


def test_off_builds_nothing_and_says_so():
    result = build(VIDGEN_BUILD="off")
    assert result.returncode == 0 and "not built (VIDGEN_BUILD=off)" in result.stderr


def test_without_a_compiler_auto_installs_the_reference_path_and_says_why():
    result = build(VIDGEN_BUILD="auto", CXX="no-such-compiler")
    assert result.returncode == 0
    assert "no C++ compiler ('no-such-compiler' not found" in result.stderr
    assert "runs on its reference" in result.stderr


def test_without_a_compiler_required_fails():
    result = build(VIDGEN_BUILD="required", CXX="no-such-compiler")
    assert result.returncode != 0 and "no C++ compiler" in result.stderr


def test_an_unknown_mode_is_refused():
    result = build(VIDGEN_BUILD="perhaps")
    assert result.returncode != 0 and "VIDGEN_BUILD must be one of auto, required, off, got 'perhaps'" in result.stderr


@pytest.fixture
def package(tmp_path):
    shutil.copytree(ROOT / "vidgen", tmp_path / "vidgen", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


REPORT = "from vidgen import ops; import torch; x = torch.ones(1, 2, 3); print(ops.native_status); ops.adaln_modulate(x, x, x)"  # fmt: skip  # noqa: E501


@pytest.mark.skipif(ops.native_status is not None, reason="no compiled kernels here")
def test_a_library_for_another_torch_is_refused_with_advice(package):
    record = package / "vidgen" / "_C.build.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.9.9"}))
    result = run(REPORT, package)
    assert result.returncode == 0, result.stderr
    assert f"built for torch 2.9.9, this is torch {torch.__version__}; rebuild with" in result.stdout
    assert "UserWarning: vidgen: the compiled kernels are not used" in result.stderr


@pytest.mark.skipif(ops.native_status is not None, reason="no compiled kernels here")
def test_a_damaged_library_is_refused_not_a_crash(package):
    (library,) = (package / "vidgen").glob("_C.*.so")
    library.write_bytes(library.read_bytes()[:4096])
    result = run(REPORT, package)
    assert result.returncode == 0, result.stderr
    assert "the compiled kernels are not used" in result.stderr and "rebuild with" in result.stdout


def test_without_a_library_everything_runs_silently_on_the_reference(package):
    for file in (package / "vidgen").glob("_C.*"):
        file.unlink()
    result = run(REPORT, package)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("not built; rebuild with")


def lower_capabilities():
    """Instruction sets below the one in use that this machine has, and no library at all."""
    names = ["default", "avx2", "avx512", "avx512_bf16"]
    best = ops.cpu_capability().lower()
    below = names[: names.index(best)] if best in names else []
    return [*({"ATEN_CPU_CAPABILITY": name} for name in below), {"VIDGEN_NATIVE": "0"}]


def each_lower_capability():
    """The lowest instruction set is slow."""
    for environment in lower_capabilities():
        marks = [pytest.mark.slow] if "default" in environment.values() else []
        yield pytest.param(environment, marks=marks, id="-".join(environment.values()))


@pytest.mark.parametrize("environment", list(each_lower_capability()))
def test_battery_passes_under_other_instruction_sets_and_without_the_library(environment):
    if ops.native_status is not None:
        pytest.skip("no compiled kernels here: the battery itself already ran on the references")
    chosen = "error_is or gradients_are or every_output or any_shape or out_form or repeat"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(BATTERY), "-k", chosen]
    fewer = {**os.environ, **environment, "EXAMPLES": "20"}
    result = subprocess.run(command, cwd=ROOT, env=fewer, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
