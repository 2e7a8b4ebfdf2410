# SPDX-License-Identifier: Apache-2.0
"""The report for real devices: what it finds, what it survives, and a dry run on the emulated device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.npu import environment
from tests.npu.conftest import need
from vidgen import ops
from vidgen.ops._registry import Backend

HERE = Path(__file__).resolve().parents[2] / "npu_kernels" / "on_device"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program():
    """Modules ``cases``, ``run`` and ``report`` as the program itself sees them."""
    before = list(sys.path)
    sys.path.insert(0, str(HERE))
    import accuracy
    import cases
    import report
    import run

    yield {"accuracy": accuracy, "cases": cases, "report": report, "run": run}
    sys.path[:] = before
    for name in ("accuracy", "cases", "report", "run", "small_models"):
        sys.modules.pop(name, None)


def start(*arguments, environment=None):
    command = [sys.executable, str(HERE / "run.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def lines(folder):
    return (folder / "cases.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_a_report_from_a_cpu(tmp_path):
    only = ("dispatch/haar_2d/float32/*", "values/haar_2d/cpu_cpp/*", "bench/haar_2d/fl*", "models/cogvideox/tran*/fl*")
    arguments = ["--device", "cpu", "--output", tmp_path, *(word for name in only for word in ("--only", name))]
    done = start(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["all_passed"] and found["missing"] == 0 and found["failures"] == []
    rows = {row["case"]: row for row in found["rows"]}
    samples = len(ops.OPS["haar_2d"].samples(CPU, torch.float32))
    assert rows["values/haar_2d/cpu_cpp/bfloat16"]["verdicts"] == {"passed": samples}
    assert rows["dispatch/haar_2d/float32"]["backends"] == {ops.table("cpu")["haar_2d"][0]: samples}
    assert 0 < rows["models/cogvideox/transformer"]["worst"] <= 1
    (times,) = found["times"]
    assert times["ms"]["cpu_cpp"] > 0 and times["ms"]["eager"] > 0 and times["ms"]["copy"] > 0
    page = (tmp_path / "report.md").read_text()
    assert "| values/haar_2d/cpu_cpp/float32 |" in page and "Not built" in page and "EMULATED" not in page
    # Once more: what is done is left as it is; the case whose line was cut off runs again.
    kept = lines(tmp_path)
    (tmp_path / "cases.jsonl").write_text("\n".join(kept[:-1]) + '\n{"case": "cut o')
    assert start(*arguments).returncode == 0
    assert lines(tmp_path)[:-1] == kept[:-1]
    assert json.loads(lines(tmp_path)[-1])["case"] == json.loads(kept[-1])["case"]


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = start("--device", "cuda", "--output", tmp_path)
    assert done.returncode == 2 and "'cuda' cannot be used here" in done.stderr


def test_dry_run_on_the_emulated_device(tmp_path):
    need("torch_npu")
    only = ("values/attention/npu_torch/*", "gradients/rope_3d/npu_torch/float32/*", "models/cogvideox/t*/float32")
    arguments = ["--device", "npu", "--emulate", "--output", tmp_path]
    arguments += [word for name in (*only, "bench/haar_2d/float32/*") for word in ("--only", name)]
    done = start(*arguments, environment=environment.torch_npu())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["emulated"] and found["facts"]["measured on"].startswith("npu (Ascend")
    rows = {row["case"]: row["verdicts"] for row in found["rows"]}
    assert rows["values/attention/npu_torch/bfloat16"]["passed"] > 1
    assert rows["gradients/rope_3d/npu_torch/float32"]["passed"] > 1
    assert rows["models/cogvideox/training"] == {"passed": 1}
    assert (tmp_path / "report.md").read_text().count("EMULATED, which says nothing about a device") == 1


# What is found


def haar(change):
    def run(video, *rest):
        return change(ops.OPS["haar_2d"].reference(video, *rest))

    return run


def raises(*args):
    raise RuntimeError("launch failed")


def spoils_arguments(video, *rest):
    result = ops.OPS["haar_2d"].reference(video, *rest)
    video.zero_()
    return result


def leaves_a_hole(video, *rest):
    result = ops.OPS["haar_2d"].reference(video, *rest)
    out = torch.empty_like(result)
    if out.isnan().all():
        out.flatten()[:-1] = result.flatten()[:-1]
    else:  # an earlier call has left the right number where this one writes none
        out.copy_(result)
    return out


WRONG = {
    "a little off": (haar(lambda y: y * 1.001), "failed", "result 0 is off by"),
    "nan": (haar(lambda y: torch.where(y == y.max(), float("nan"), y)), "failed", "finite where eager is not"),
    "another shape": (haar(lambda y: y[..., :1]), "failed", "instead of"),
    "another dtype": (haar(lambda y: y.double()), "failed", "torch.float64"),
    "raises": (raises, "error", "RuntimeError: launch failed"),
    "spoils its arguments": (spoils_arguments, "failed", "the arguments have changed"),
    "leaves a hole": (leaves_a_hole, "failed", "gives something else"),
    "right": (haar(lambda y: y), "passed", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(program, monkeypatch, name):
    run, verdict, words = WRONG[name]
    monkeypatch.setitem(ops.OPS["haar_2d"].backends, "cpu", [Backend("mine", run)])
    number = next(i for i, args in enumerate(ops.OPS["haar_2d"].samples(CPU, torch.float32)) if args[0].numel() > 100)
    found = program["cases"].run_case(f"values/haar_2d/mine/float32/{number}", CPU)
    assert found["verdict"] == verdict and words in found.get("why", "")


def test_refusals_are_no_failures(program, monkeypatch):
    backend = Backend("mine", raises, lambda *args: "not today")
    monkeypatch.setitem(ops.OPS["haar_2d"].backends, "cpu", [backend])
    found = program["cases"].run_case("values/haar_2d/mine/float32/0", CPU)
    assert (found["verdict"], found["why"]) == ("refused", "not today")
    assert program["cases"].run_case("values/haar_2d/gone/float32/0", CPU)["verdict"] == "refused"


def test_a_wrong_gradient_is_found(program, monkeypatch):
    op = ops.OPS["attention"]

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    chain = [Backend("mine", lambda *args: Wrong.apply(op.reference(*args)))]
    monkeypatch.setitem(op.backends, "cpu", chain)
    assert program["cases"].run_case("gradients/attention/mine/float32/0", CPU)["verdict"] == "failed"
    chain[0] = Backend("mine", op.reference)
    assert program["cases"].run_case("gradients/attention/mine/float32/0", CPU)["verdict"] == "passed"


def test_a_wrong_model_is_found(program, monkeypatch):
    right = program["cases"].run_case("models/opensora_v2/transformer/float32", CPU)
    assert right["verdict"] == "passed" and right["error"] < 1e-5  # the CPU against itself
    import small_models

    plain = small_models.forward_and_backward

    def off(model, inputs):
        found = plain(model, inputs)
        if next(model.parameters()).dtype == torch.float32:
            off.calls += 1
            if off.calls == 2:  # the first is eager, the second what is judged
                found["output 0"] = found["output 0"] * 1.001
        return found

    off.calls = 0
    monkeypatch.setattr(small_models, "forward_and_backward", off)
    wrong = program["cases"].run_case("models/opensora_v2/transformer/float32", CPU)
    assert wrong["verdict"] == "failed" and "output 0 is off by 0.001" in wrong["why"]


def test_every_case_of_the_list_can_be_run(program):
    listed = list(program["cases"].names(CPU))
    assert len(listed) == len(set(listed)) > 1000
    assert {name.split("/")[1] for name in listed if name.startswith("values/")} == set(ops.OPS)
    assert {name.split("/")[0] for name in listed} == set(program["cases"].RUNNERS)


# What it survives

PROCESS = """
import os, sys, time
for line in sys.stdin:
    name = line.strip()
    print("begin", name, flush=True)
    if name.endswith("dies"):
        print("last words", file=sys.stderr, flush=True)
        os.abort()
    if name.endswith("hangs"):
        time.sleep(600)
    print('end {"case": "%s", "verdict": "passed"}' % name, flush=True)
"""


def test_a_case_that_takes_its_process_with_it(program, monkeypatch, tmp_path):
    monkeypatch.setattr(program["run"], "command", lambda options: [sys.executable, "-c", PROCESS])
    options = program["run"].parse(["--output", str(tmp_path), "--timeout", "10"])
    names = ["a/1", "a/dies", "a/2", "a/hangs", "a/3"]
    found = {result["case"]: result for result in program["run"].run_group(names, options)}
    verdicts = {name: found[name]["verdict"] for name in names}
    assert verdicts == {"a/1": "passed", "a/dies": "crashed", "a/2": "passed", "a/hangs": "timed out", "a/3": "passed"}
    assert "exit code -6" in found["a/dies"]["why"] and "last words" in found["a/dies"]["trace"]
    assert "no answer within 10 s" in found["a/hangs"]["why"]


def test_a_process_that_never_begins(program, monkeypatch, tmp_path):
    monkeypatch.setattr(program["run"], "command", lambda options: [sys.executable, "-c", "import sys; sys.exit(3)"])
    options = program["run"].parse(["--output", str(tmp_path)])
    found = list(program["run"].run_group(["a/1", "a/2"], options))
    assert [result["verdict"] for result in found] == ["crashed", "crashed"]
    assert "exit code 3) before its first case" in found[0]["why"]


def test_a_build_without_a_compiler_is_told(program, monkeypatch, tmp_path):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert "ASCEND_HOME_PATH is not set" in program["run"].build(tmp_path)["skipped"]
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setattr(program["run"], "ROOT", tmp_path)
    built = program["run"].build(tmp_path)
    if "skipped" not in built:
        assert not built["library"] and any("CANN was not found" in line for line in built["said"])
        assert "NO library" in program["report"].build_line(built)
