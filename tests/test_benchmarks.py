# SPDX-License-Identifier: Apache-2.0
"""The baselines of the speed table compute what the ops compute, and the table can be made."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidgen import ops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in ("originals", "measure", "report")}
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def originals(modules):
    return modules["originals"]


def run(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    path = os.pathsep.join((str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")))
    environment = {"VIDGEN_BACKEND": "", **environment}
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300
    )


def comparable(name, args):
    """Not empty, large enough that a norm does not cancel everything, and what PyTorch itself can differentiate."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if min(t.numel() for t in tensors) == 0 or max(t.numel() for t in tensors) < 8:
        return False
    # PyTorch's gradient of group_norm fails where only one of weight and bias is there.
    return not (name == "group_norm_silu_backward" and (args[3] is None) != (args[4] is None))


def test_every_op_has_an_original(originals):
    assert set(originals.ORIGINALS) == set(ops.OPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(ops.OPS))
def test_originals_equal_their_ops(originals, name, dtype):
    torch.manual_seed(0)
    compared = 0
    for i, args in enumerate(ops.OPS[name].samples(CPU, dtype)):
        if comparable(name, args):
            original = originals.bind(originals.ORIGINALS[name], args)()
            error = originals.relative_error(original, ops.OPS[name](*args))
            assert error <= originals.tolerance(dtype), f"sample {i}"
            compared += 1
    assert compared >= 2


def test_what_is_compiled_is_what_is_measured(originals):
    """A gradient's baseline goes through the transformed function, and gives None for what is not there."""
    args = ops.OPS["adaln_modulate_backward"].samples(CPU, torch.float32)[1]
    seen = []

    def transform(function):
        return lambda *inputs: seen.append(function) or function(*inputs)

    grads = originals.bind(originals.ORIGINALS["adaln_modulate_backward"], args, transform)()
    assert seen == [originals.adaln_modulate]
    assert [g is None for g in grads] == [False, False, False, True, True]


def test_errors_are_seen(originals):
    a = torch.randn(10)
    assert originals.relative_error([a, None], [a, a]) == 0
    assert originals.relative_error([a, a * 1.1], [a, a]) == pytest.approx(0.1, rel=1e-4)
    assert originals.relative_error(a.fill_(float("nan")), torch.ones(10)) != 0
    with pytest.raises(ValueError):
        originals.relative_error([a], [a, a])


def test_quick_run_adds_to_the_csv_of_the_device(tmp_path, modules):
    measure, report = modules["measure"], modules["report"]
    times = {"ours": 2.0, "eager": 3.0, "roofline": 1.0}
    earlier = measure.row("haar_2d", "float32", "1x3", 1, CPU, times)
    path = report.write([earlier], tmp_path)

    done = run("--quick", "--op", "gated_residual", "--dtype", "float32", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    new, kept = csv.DictReader(path.open())
    assert kept == {name: str(value) for name, value in earlier.items()}
    assert (kept["ratio_to_eager"], kept["ratio_to_compile"], kept["ratio_to_roofline"]) == ("1.50", "", "0.50")
    assert (new["op"], new["dtype"], new["threads"]) == ("gated_residual", "float32", "1")
    assert min(float(new[name]) for name in ("median_ms", "ratio_to_eager", "ratio_to_roofline")) > 0
    assert "| gated_residual | float32 |" in done.stdout and "median_ms" not in done.stdout
    assert path.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_candidates_take_turns(modules):
    calls, now = [], iter(range(1000))
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = modules["measure"].in_turns(steps, lambda: float(next(now)))
    assert times == {"a": 1.0, "b": 1.0}
    assert calls == ["a", "a", "b", "b", *["a", "b"] * 3], "slow steps: the fewest rounds"


def test_a_forced_backend_is_refused(tmp_path):
    done = run("--quick", "--op", "gated_residual", "--output", str(tmp_path), VIDGEN_BACKEND="reference")
    assert done.returncode != 0 and "unset VIDGEN_BACKEND" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_op_that_is_not_there_is_refused(tmp_path):
    done = run("--quick", "--op", "no_such_op", "--output", str(tmp_path))
    assert done.returncode != 0 and "no op 'no_such_op'; there are adaln_modulate" in done.stderr
