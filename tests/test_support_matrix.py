# SPDX-License-Identifier: Apache-2.0
"""docs/support_matrix.md claims only what tests can bear out, about the ops and backends that there are."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load():
    spec = importlib.util.spec_from_file_location("support_matrix", Path(__file__).with_name("support_matrix.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_matrix"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


matrix = load()


@pytest.fixture(scope="module")
def written():
    return json.loads(matrix.DATA.read_text())


@pytest.fixture(scope="module")
def collected():
    """Every test that there is of those that evidence may come from."""
    files = {name.partition("::")[0] for e in (*matrix.EVIDENCE, *matrix.OF_SYSTEMS) for name in (*e.each, *e.all)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *sorted(files)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_the_page_is_what_its_data_says(written):
    assert matrix.PAGE.read_text() == matrix.render(written)


def test_ops_and_backends_are_those_of_the_registry(written):
    expected = {
        op: {
            f"{kind} {name}" for kind, names in kinds.items() for name in names or (["plain"] if kind == "cpu" else [])
        }
        for op, kinds in matrix.backends().items()
    }
    assert {op: set(row) for op, row in written["ops"].items()} == expected, "run `make matrix`"
    assert set(written["systems"]) == set(matrix.SYSTEMS)


def test_every_claim_has_tests(written, collected):
    for op, row in written["ops"].items():
        for column, rungs in row.items():
            kind, backend = column.split()
            for rung in set(rungs) - set(matrix.DEVICE_RUNGS.values()):
                found = [e for e in matrix.EVIDENCE if (e.rung, e.kind) == (rung, kind)]
                found = [e for e in found if e.backend in (backend, "first")]
                assert len(found) == 1, f"{op} {column} {rung}"
                assert all(matrix.tests_of(found[0], op, collected)), f"{op} {column} {rung}: no such tests"
    for name, rungs in written["systems"].items():
        for rung in rungs:
            (evidence,) = (e for e in matrix.OF_SYSTEMS if e.rung == rung)
            assert all(matrix.tests_of(evidence, name, collected)), f"{name} {rung}: no such tests"


def test_claims_about_devices_have_reports(written):
    reports = matrix.read_reports()
    assert set(written["reports"]) == set(reports)
    for op, row in written["ops"].items():
        for column, rungs in row.items():
            kind, backend = column.split()
            first = matrix.backends()[op][kind][:1] == [backend]
            claimed = matrix.DEVICE_RUNGS.get(kind) in rungs
            assert claimed == matrix.ran_on_device(kind, op, backend, first, reports), f"{op} {column}"


def test_an_op_with_a_failure_on_a_gpu_claims_nothing_of_it():
    def battery(*failed):
        return {"a": {"ops": {"gelu": {"passed": 3, "failed": list(failed)}}}}

    assert matrix.passed_battery("gelu", battery()) and not matrix.passed_battery("haar_2d", battery())
    assert not matrix.passed_battery("gelu", battery("test_x[gelu-float32-0]"))


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.npu.test_npu_ops" name="test_samples[gelu-float32]"/>
<testcase classname="tests.npu.test_npu_ops" name="test_samples[gelu-bfloat16]">{}</testcase>
<testcase classname="tests.npu.test_npu_ops" name="test_samples[rope_3d-float32]"/>
<testcase classname="tests.triton.test_lowering" name="test_a"/>
<testcase classname="tests.triton.test_lowering" name="test_b[x]"/>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    "inside, holds", [("", True), ("<failure/>", False), ("<skipped/>", False), ("<error/>", False)]
)
def test_a_claim_needs_every_test_to_pass(tmp_path, inside, holds):
    (tmp_path / "tests.xml").write_text(JUNIT.format(inside))
    results = matrix.read_results(tmp_path / "tests.xml")
    evidence = matrix.Evidence("4", "npu", "npu_torch", each=("tests/npu/test_npu_ops.py::test_samples",))
    assert matrix.borne_out(evidence, "gelu", results) == holds
    assert matrix.borne_out(evidence, "rope_3d", results)
    assert not matrix.borne_out(evidence, "rope", results)  # the beginning of another name
    every = matrix.Evidence("5", "npu", "triton", all=("tests/triton/test_lowering.py",))
    assert matrix.borne_out(every, "gelu", results)
    assert not matrix.borne_out(matrix.Evidence("5", "npu", "triton", all=("tests/triton/none.py",)), "gelu", results)


def test_a_claim_that_a_run_contradicts_is_told(capsys, monkeypatch):
    written = {"ops": {"gelu": {"npu npu_torch": ["1", "4"]}}, "systems": {"cogvideox": ["3"]}}
    found = {"ops": {"gelu": {"npu npu_torch": ["1"]}}, "systems": {"cogvideox": ["3"]}}
    monkeypatch.setenv("CI", "true")
    assert matrix.check(written, found) == 1
    assert "gelu npu npu_torch: rung 4 is not borne out" in capsys.readouterr().out
    assert matrix.check(found, written) == 0


def test_a_report_of_an_emulated_device_is_no_evidence(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "REPORTS", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"emulated": True}))
    with pytest.raises(ValueError, match="a.json is of an emulated device"):
        matrix.read_reports()


@pytest.mark.parametrize(
    "verdicts, claimed", [({"passed": 3, "refused": 1}, True), ({"passed": 3, "failed": 1}, False)]
)
def test_a_report_counts_where_nothing_in_it_failed(verdicts, claimed):
    rows = [{"case": "values/gelu/triton/float32", "verdicts": verdicts}]
    report = {"device": "cuda:0", "emulated": False, "rows": rows}
    assert matrix.passed_on_device("cuda", "gelu", "triton", {"x": report}) == claimed
    assert not matrix.passed_on_device("npu", "gelu", "triton", {"x": report})
    assert not matrix.passed_on_device("cuda", "rope_3d", "triton", {"x": report})
    assert not matrix.passed_on_device("cuda", "gelu", "triton", {})
