# SPDX-License-Identifier: Apache-2.0
"""The baselines of the speed table compute what the ops compute, and the table can be made."""

import argparse
import csv
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vidgen import ops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    names = ("originals", "measure", "report", "workloads", "device_timing", "attention", "liger", "models")
    yield {name: importlib.import_module(name) for name in names}
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


@pytest.fixture
def small(modules):
    """Of the workloads of accelerators."""
    return modules["workloads"].Sizes(grid=(2, 8, 8), heads=2, head_dim=16, text=3, video=(5, 8, 8), layer=(3, 4, 4))


def test_workloads_of_accelerators_fit_their_ops(modules, small):
    originals, shapes = modules["originals"], modules["workloads"].workloads(CPU, torch.float64, small)
    torch.manual_seed(0)
    for op, makes in shapes.items():
        for shape, make in makes.items():
            args = make()
            error = originals.relative_error(originals.bind(originals.ORIGINALS[op], args)(), ops.OPS[op](*args))
            assert error <= originals.tolerance(torch.float64), (op, shape)
    elsewhere = {name for name in ops.OPS if "attention" in name}  # attention.py
    of_the_library = {"causal_conv3d", "gelu"}
    assert set(shapes) == set(ops.OPS) - elsewhere - of_the_library
    assert "1x36864x3072" in modules["workloads"].workloads(CPU, torch.float64)["gated_residual"]


def test_device_timing_takes_turns_and_the_median(modules, monkeypatch):
    timing, calls = modules["device_timing"], []
    durations = iter([1.0, 1.0, 3e-3, 1e-3, 5e-3, 1e-3, 9e-3, 1e-3, 4e-3, 1e-3, 2e-3, 1e-3])
    monkeypatch.setattr(timing.HostEvent, "elapsed_time", lambda start, end: next(durations) * 1e3)
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    assert timing.in_turns(steps, CPU) == {"a": 4e-3, "b": 1e-3}
    assert calls == ["a", "b"] * (2 + timing.ROUNDS[0]), "slow steps: the fewest rounds"


def test_what_is_timed_is_the_call_and_not_what_goes_before(modules):
    watch = modules["device_timing"].Watch(CPU)
    (seconds,) = watch.seconds([watch.time(lambda: time.sleep(0.02))])
    assert 0.02 <= seconds < 2
    peaks = modules["device_timing"].peaks(CPU, torch.float32, size=64, moved=2**20)
    assert peaks["copy"] > 1e6 and peaks["matmul"] > 1e6


def test_figures_of_an_accelerator(modules):
    measure, report = modules["measure"], modules["report"]
    times = {"ours": 2e-3, "eager": 6e-3, "compile": 3e-3, "liger": 4e-3, "roofline": 1e-3}
    row = measure.row("haar_2d", "bfloat16", "1x3", 1, CPU, times)
    row = measure.accelerator_row(row, times, moved=4 * 10**9, bandwidth=2.5e12)
    assert set(row) == set(report.ACCELERATOR_COLUMNS)
    assert (row["median_us"], row["gb_per_s"], row["share_of_copy"]) == ("2000.0", "2000", "0.80")
    assert (row["ratio_to_eager"], row["ratio_to_compile"], row["ratio_to_liger"]) == ("3.00", "1.50", "2.00")
    assert "| haar_2d | bfloat16 | 1x3 | 2000.0 | 2000 | 0.80 | 3.00 |" in report.markdown([row])


def measured(modules, monkeypatch, shapes, **options):
    """Rows as an accelerator has them, from the CPU."""
    measure = modules["measure"]
    for name in ("failed", "reached"):
        monkeypatch.setattr(measure, name, [])
    monkeypatch.setattr(measure, "is_accelerator", lambda device: True)
    monkeypatch.setattr(measure, "shapes_for", lambda device, dtype: shapes)
    peaks = {"copy": 1e9, "matmul": 1e12}
    monkeypatch.setattr(modules["device_timing"], "peaks", lambda device, dtype: peaks)
    arguments = argparse.Namespace(device="cpu", op=None, dtype=None, threads=[1], quick=True)
    return list(measure.measure_all(arguments))


def test_ops_are_measured_as_on_an_accelerator(modules, small, monkeypatch, tmp_path):
    measure, report = modules["measure"], modules["report"]
    shapes = modules["workloads"].workloads(CPU, torch.bfloat16, small)
    rows = measured(modules, monkeypatch, {op: shapes[op] for op in ("adaln_modulate_backward", "haar_3d")})
    assert [(row["op"], row["dtype"], row["shape"]) for row in rows] == [
        ("adaln_modulate_backward", "bfloat16", "1x128x32 affine"), ("haar_3d", "bfloat16", "1x3x5x8x8"),
    ]  # fmt: skip
    assert all(float(row["median_us"]) > 0 and float(row["ratio_to_eager"]) > 0 for row in rows)
    assert measure.reached == ["copy 1 GB/s, bfloat16 matmul 1 TFLOP/s"]
    path = report.write(rows[:1], tmp_path)
    assert report.write(rows, tmp_path) == path and len(report.read(path)) == 2, "rows are replaced, not repeated"


def test_a_row_that_fails_is_told_and_the_others_go_on(modules, small, monkeypatch, capsys):
    def broken():
        raise RuntimeError("out of memory")

    shapes = modules["workloads"].workloads(CPU, torch.bfloat16, small)
    rows = measured(modules, monkeypatch, {"gated_residual": {"first": broken}, "haar_2d": shapes["haar_2d"]})
    assert [row["op"] for row in rows] == ["haar_2d"] and modules["measure"].failed == ["gated_residual"]
    assert "gated_residual first: RuntimeError: out of memory" in capsys.readouterr().err


def test_skiparse_attention_is_measured_against_dense(modules, small, monkeypatch):
    attention = modules["attention"]
    monkeypatch.setattr(attention, "failed", [])
    rows = list(attention.measure_all(CPU, torch.float32, quick=True, sizes=small))
    assert attention.failed == []
    found = {(row["case"], row["implementation"]) for row in rows}
    for case in ("k=4 single", "k=4 group", "k=4 group, grouped"):
        assert {(case, "ours (composite)"), (case, "copies and SDPA")} <= found
    assert ("dense", "SDPA default") in found
    assert all(float(row["to_ideal_best"]) > 0 for row in rows if row["case"] != "dense")
    # a quarter of the arithmetic in half of the time: twice the ideal
    row = attention.row("k=4", "ours", seconds=0.5, flops=250, best=1 / 1000, flash=2 / 1000)
    assert (row["median_us"], row["to_ideal_best"], row["to_ideal_flash"]) == ("500000", "2.000", "1.000")


def test_an_implementation_of_attention_that_is_wrong_has_no_figure(modules, small, monkeypatch):
    attention = modules["attention"]
    monkeypatch.setattr(attention, "failed", [])
    wrong = modules["originals"].Original(lambda q, *_: [torch.zeros_like(q)])
    monkeypatch.setitem(modules["originals"].ORIGINALS, "skiparse_attention", wrong)
    rows = list(attention.measure_all(CPU, torch.float32, quick=True, sizes=small))
    assert not any(row["implementation"] == "copies and SDPA" for row in rows)
    assert attention.failed[0] == "copies and SDPA, k=4 single" and len(attention.failed) == 3


def test_flex_attention_computes_the_same(modules, small, monkeypatch):
    """Not compiled here: with its plain formula."""
    attention = modules["attention"]
    monkeypatch.setattr(attention, "failed", [])
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    for case in (attention.Case(4, "single"), attention.Case(4, "group", grouped=True)):
        args = attention.arguments(case, small, CPU, torch.float32)
        assert "FlexAttention" in attention.steps_of(case, args, compiled=True)
    assert attention.failed == []


def test_whole_model_is_measured_sparse_and_dense(modules, monkeypatch):
    models = modules["models"]
    sizes = ["--size", "9", "64", "64", "--text", "5"]
    arguments = ["--device", "cpu", "--preset", "tiny", "--dtype", "float32", "--repeats", "1", *sizes]
    ratios, plain = [], ops.skiparse_attention

    def attend(*args, sparse_n, **options):
        ratios.append(sparse_n)
        return plain(*args, sparse_n=sparse_n, **options)

    monkeypatch.setattr(ops, "skiparse_attention", attend)
    rows = {row["case"]: row for row in models.measure_all(models.parse(arguments))}
    assert ratios == [1] * 12 + [1, 1, 2, 2, 1, 1] * 4, "dense, then as configured, then without kernels; twice each"
    assert set(rows) == {"dense", "Skiparse", "Skiparse, no kernels"}
    assert rows["dense"]["faster"] == rows["dense"]["attention_faster"] == "1.00"
    for row in rows.values():
        assert 0 < float(row["attention_s"]) < float(row["forward_s"])
        assert tuple(row)[: len(models.COLUMNS)] == models.COLUMNS
    assert float(rows["Skiparse"]["error"]) < 1e-5
    assert "| dense |" in modules["report"].table(list(rows.values()), models.COLUMNS)


def test_without_kernels_gives_them_back(modules):
    op = ops.OPS["gated_residual"]
    ops.table("cuda")  # loads what there is
    before = op.backends.get("cuda", [])
    op.backends["cuda"] = [ops._registry.Backend("some", op.reference)]
    try:
        with modules["models"].without_kernels(torch.device("cuda")):
            assert ops.table("cuda")["gated_residual"] == ["reference"]
        assert ops.table("cuda")["gated_residual"] == ["some", "reference"]
    finally:
        op.backends["cuda"] = before
