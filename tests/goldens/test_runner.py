# SPDX-License-Identifier: Apache-2.0
"""The runner must fail where it should; a runner that passes everything looks the same as a correct model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .comparison import Case, Comparison
from .conftest import golden_files
from .test_goldens import run_case

DATA = Path(__file__).parent.parent / "data" / "golden"


@pytest.fixture
def optimizer_case(tmp_path: Path) -> Path:
    """A private copy of a small case."""
    folder = tmp_path / "opensora_plan_v1_5"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(DATA / f"opensora_plan_v1_5/fused_ema_adamw{suffix}", folder / f"fused_ema_adamw{suffix}")
    return folder / "fused_ema_adamw.json"


def comparison(tolerance: dict, **expected: torch.Tensor) -> Comparison:
    tensors = {f"out/{name}": value for name, value in expected.items()}
    return Comparison(Case("system", "case", {"kind": "kind", "tolerance": tolerance}, tensors))


def test_tolerance_is_absolute_plus_relative():
    stored = torch.tensor([0.0, 100.0])
    for error, passes in (([0.9e-3, 0.9], True), ([1.1e-3, 0.0], False), ([0.0, 1.1], False)):
        compare = comparison({"atol": 1e-3, "rtol": 1e-2}, x=stored)
        compare("x", stored + torch.tensor(error))
        assert bool(compare.worst.failures) is not passes
        assert compare.worst.error == pytest.approx(max(error), rel=1e-5)


def test_exact_means_equal():
    for ours, passes in (([1, 2], True), ([1, 3], False)):
        compare = comparison({"exact": True}, x=torch.tensor([1, 2]))
        compare("x", torch.tensor(ours))
        assert bool(compare.worst.failures) is not passes


@pytest.mark.parametrize("ours", [[float("nan"), 1.0], [float("inf"), 1.0], [1.0]])
def test_not_finite_and_wrong_shape_fail(ours):
    compare = comparison({"atol": 1.0, "rtol": 1.0}, x=torch.tensor([1.0, 1.0]))
    compare("x", torch.tensor(ours))
    assert compare.worst.failures


def test_nan_matches_only_nan():
    compare = comparison({"atol": 1.0, "rtol": 1.0}, x=torch.tensor([float("nan"), float("inf")]))
    compare("x", torch.tensor([float("nan"), float("inf")]))
    assert not compare.worst.failures
    compare("x", torch.tensor([0.0, float("inf")]))
    assert compare.worst.failures


def test_output_left_uncompared_fails():
    compare = comparison({"exact": True}, x=torch.ones(1), y=torch.ones(1))
    compare("x", torch.ones(1))
    with pytest.raises(AssertionError, match="never compared: y"):
        compare.finish()


def test_wrong_stored_value_fails(optimizer_case):
    run_case(optimizer_case, [])
    file = optimizer_case.with_suffix(".safetensors")
    tensors = load_file(file)
    tensors["out/ema1_step6"][0] += 1e-4
    save_file(tensors, file)
    with pytest.raises(AssertionError, match="ema1_step6: 1 of 7 values differ"):
        run_case(optimizer_case, [])


def test_unknown_kind_fails_and_unbuilt_kind_is_skipped_by_name(optimizer_case):
    meta = json.loads(optimizer_case.read_text())
    optimizer_case.write_text(json.dumps({**meta, "kind": "brand_new"}))
    with pytest.raises(pytest.fail.Exception, match="'brand_new' of folder 'opensora_plan_v1_5'"):
        run_case(optimizer_case, [])
    # a kind known in one folder is unknown in another
    other = optimizer_case.parent.parent / "opensora_v2"
    shutil.copytree(optimizer_case.parent, other)
    (other / optimizer_case.name).write_text(json.dumps(meta))
    with pytest.raises(pytest.fail.Exception, match="'optimizer' of folder 'opensora_v2'"):
        run_case(other / optimizer_case.name, [])
    (other / optimizer_case.name).write_text(json.dumps({**meta, "kind": "buckets"}))
    with pytest.raises(pytest.skip.Exception, match="not built yet: opensora_v2 buckets"):
        run_case(other / optimizer_case.name, [])


def test_command_line(optimizer_case):
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "test_goldens.py"), "--goldens"]

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[2])

    done = run(optimizer_case.parent)  # one system's folder
    assert done.returncode == 0, done.stdout + done.stderr
    assert "opensora_plan_v1_5/fused_ema_adamw  optimizer" in done.stdout
    assert "1 passed" in done.stdout


def test_folders_are_found_and_empty_ones_refused(optimizer_case, tmp_path):
    assert golden_files(tmp_path) == golden_files(optimizer_case.parent) == [optimizer_case]
    optimizer_case.write_text(json.dumps({"kind": "index"}))
    for folder, reason in ((tmp_path, "has no"), (tmp_path / "nowhere", "is not a folder")):
        with pytest.raises(pytest.UsageError, match=reason):
            golden_files(folder)
