# SPDX-License-Identifier: Apache-2.0
"""docs/support_matrix.md: which op has which backend, and how far each was verified, from registry and test results.

    pytest --junitxml=build/tests.xml tests/ops tests/npu tests/triton tests/npu_kernels
    python tests/support_matrix.py build/tests.xml            # write it
    python tests/support_matrix.py build/tests.xml --check    # does this run bear out what is written?

A cell of the table claims a rung only where every test that EVIDENCE names for it has passed in that run, and for a
real device, where a report of npu_kernels/on_device is kept in its folder ``results``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import xml.etree.ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "docs" / "support_matrix.json", ROOT / "docs" / "support_matrix.md"
REPORTS = ROOT / "npu_kernels" / "on_device" / "results"
BATTERIES = ROOT / "benchmarks" / "results"  # of `make test-device` on a GPU
PLAIN = ("composite", "reference")
SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")


@dataclass(frozen=True)
class Evidence:
    """What backs a rung: ``each`` are tests whose id begins with the op, ``all`` files or tests that speak of all ops.

    ``backend`` may be "first": the one that the dispatcher takes first.
    """

    rung: str
    kind: str
    backend: str
    each: tuple[str, ...] = ()
    all: tuple[str, ...] = ()


BATTERY = tuple(
    f"tests/ops/test_all_ops.py::test_{name}"
    for name in ("error_is_at_most_twice_that_of_eager", "any_shape_and_stride", "opcheck")
)
INTERPRETER = "tests/triton/test_interpreter.py::test_battery_in_the_interpreter"
EVIDENCE = (
    Evidence("B", "cpu", "first", each=BATTERY),
    Evidence("1", "npu", "npu_torch", all=("tests/npu/test_schemas.py",)),
    Evidence(
        "2",
        "npu",
        "npu_torch",
        each=("tests/npu/test_guards.py::test_every_op_takes_a_sample_and_refuses_float64",),
        all=("tests/npu/test_guards.py::test_limit",),
    ),
    Evidence("4", "npu", "npu_torch", each=("tests/npu/test_npu_ops.py::test_samples",)),
    Evidence("I", "cuda", "triton", each=(INTERPRETER,)),
    Evidence("5", "npu", "triton", each=(INTERPRETER,), all=("tests/triton/test_lowering.py",)),
    Evidence(
        "6",
        "npu",
        "npu_ascendc",
        each=("tests/npu_kernels/test_kernels.py::test_samples", "tests/npu/test_ascendc.py::test_samples"),
        all=(
            "tests/npu_kernels/test_twin.py",
            "tests/npu_kernels/test_tiling.py",
            "tests/npu_kernels/test_budgets.py",
            "tests/npu_kernels/test_api.py",
        ),
    ),
)
OF_SYSTEMS = (
    Evidence("3", "npu", "", each=("tests/npu/test_systems_fake.py::test_transformer",)),
    Evidence(
        "4",
        "npu",
        "",
        each=(
            "tests/npu/test_systems_emulated.py::test_forward_backward_and_three_steps",
            "tests/npu/test_systems_emulated.py::test_autoencoder",
            "tests/npu/test_cli_emulated.py::test_train_resume_sample",
        ),
    ),
)
DEVICE_RUNGS = {"cuda": "G", "npu": "7"}

MEANING = {
    "B": "the battery of `tests/ops` on a CPU: samples, random shapes and strides, PyTorch's check of operators",
    "I": "values and gradients of every sample in Triton's interpreter; no GPU",
    "G": "values, gradients and outputs of every sample on a GPU, by the battery or `npu_kernels/on_device`; see below",
    "1": "every call binds to the schema of the real torch_npu",
    "2": "every documented limit has a guard, tested at it and beyond it",
    "3": "released sizes with fake tensors on the device npu: shapes and dtypes, no numbers",
    "4": "numbers, on a device npu that the CPU emulates: torch_npu's own wiring, our formulas in place of its kernels",
    "5": "the interpreter, and every kernel lowered by triton-ascend to Ascend's dialect, without scalar loops",
    "6": "every sample in a CPU twin of Ascend C: bounds, alignment, unified buffer, barriers, tiling",
    "7": "on an Ascend device, by `npu_kernels/on_device`; reports below",
}

# Collecting results


def read_results(path: Path) -> dict[str, str]:
    """``{"tests/npu/test_x.py::test_y[a-b]": "passed" | "failed" | "skipped"}`` of a JUnit file that pytest wrote."""
    found = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        file = (case.get("classname") or "").replace(".", "/") + ".py"
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        name = f"{file}::{case.get('name')}"
        found[name] = "failed" if "failed" in (outcome, found.get(name)) else outcome
    return found


def tests_of(evidence: Evidence, subject: str, tests: Iterable[str]) -> list[list[str]]:
    """For each name in ``each`` and ``all``, the tests that it stands for; ``subject`` is an op or a system."""
    tests = list(tests)
    groups = [[t for t in tests if re.match(re.escape(name) + rf"\[{subject}(-|\])", t)] for name in evidence.each]
    return groups + [[t for t in tests if re.match(re.escape(name) + r"(::|\[|$)", t)] for name in evidence.all]


def borne_out(evidence: Evidence, subject: str, results: dict[str, str]) -> bool:
    """Whether each of its names stands for a test that has passed, and none that has not."""
    groups = tests_of(evidence, subject, results)
    return all(group and all(results[test] == "passed" for test in group) for group in groups)


def read_reports() -> dict[str, dict[str, Any]]:
    """The kept reports of real devices by file name."""
    reports = {path.name: json.loads(path.read_text()) for path in sorted(REPORTS.glob("*.json"))}
    if emulated := [name for name, report in reports.items() if report["emulated"]]:
        raise ValueError(f"support_matrix: {emulated[0]} is of an emulated device, which is no evidence")
    return reports


def passed_on_device(kind: str, op: str, backend: str, reports: dict[str, dict[str, Any]]) -> bool:
    for report in reports.values():
        prefixes = (f"values/{op}/{backend}/", f"gradients/{op}/{backend}/")
        rows = [row["verdicts"] for row in report["rows"] if row["case"].startswith(prefixes)]
        clean = all(verdict in ("passed", "refused") for row in rows for verdict in row)
        if report["device"].partition(":")[0] == kind and clean and any("passed" in row for row in rows):
            return True
    return False


def read_batteries() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted(BATTERIES.glob("*_battery.json"))}


def passed_battery(op: str, batteries: dict[str, dict[str, Any]]) -> bool:
    """Whether on some GPU none of the op's tests failed; they run what the dispatcher takes first."""
    rows = [battery["ops"].get(op, {"passed": 0, "failed": []}) for battery in batteries.values()]
    return any(row["passed"] and not row["failed"] for row in rows)


def ran_on_device(kind: str, op: str, backend: str, first: bool, reports: dict[str, dict[str, Any]]) -> bool:
    """``first``: whether the dispatcher takes this backend first."""
    if kind not in DEVICE_RUNGS:
        return False
    battery = kind == "cuda" and first and passed_battery(op, read_batteries())
    return battery or passed_on_device(kind, op, backend, reports)


def backends() -> dict[str, dict[str, list[str]]]:
    """``{op: {kind of device: its backends, best first, without those in plain PyTorch}}``."""
    from vidgen import device, ops

    tables = {kind: ops.table(kind) for kind in device.KINDS}
    return {op: {kind: [b for b in tables[kind][op] if b not in PLAIN] for kind in tables} for op in sorted(ops.OPS)}


def collect(results: dict[str, str], reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, dict[str, list[str]]] = {}
    for op, kinds in backends().items():
        rows[op] = {}
        for kind, names in kinds.items():
            for backend in names or (["plain"] if kind == "cpu" else []):
                first = backend == (names or ["plain"])[0]
                wanted = [
                    e for e in EVIDENCE if e.kind == kind and e.backend in (backend, "first" if first else backend)
                ]
                rungs = [e.rung for e in wanted if borne_out(e, op, results)]
                if ran_on_device(kind, op, backend, first, reports):
                    rungs.append(DEVICE_RUNGS[kind])
                rows[op][f"{kind} {backend}"] = rungs
    systems = {name: [e.rung for e in OF_SYSTEMS if borne_out(e, name, results)] for name in SYSTEMS}
    kept = {
        name: {
            "device": report["facts"]["measured on"],
            "torch": report["facts"]["versions"]["torch"],
            "written": report["written"][:10],
            "counts": report["counts"],
        }
        for name, report in reports.items()
    }
    return {"ops": rows, "systems": systems, "reports": kept}


# Writing


def render(data: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(column for row in data["ops"].values() for column in row))
    columns.sort(key=lambda column: ("cpu", "cuda", "npu").index(column.split()[0]))
    used = {rung for row in data["ops"].values() for rungs in row.values() for rung in rungs}
    used |= {rung for rungs in data["systems"].values() for rung in rungs}
    lines = ["# What was verified, and how far", ""]
    lines += ["Generated by `make matrix` from the registry of ops and the results of the tests; see", ""]
    lines[-2] += " `tests/support_matrix.py`."
    lines += ["| | what it means |", "|---|---|"]
    lines += [f"| {rung} | {meaning} |" for rung, meaning in MEANING.items()]
    lines += ["| none | there is an implementation, and nothing has borne it out |"]
    lines += ["| - | there is none; PyTorch's own operators serve (`composite`, `reference`) |", ""]
    lines += ["`plain` is such a composite or reference on the CPU.", ""]
    lines += never_run(used)
    lines += ["## Ops", "", "| op | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for op, row in data["ops"].items():
        cells = ["-" if column not in row else " ".join(row[column]) or "none" for column in columns]
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    lines += ["", "## Systems on the device npu", "", "| system | rungs |", "|---|---|"]
    lines += [f"| {name} | {' '.join(rungs) or 'none'} |" for name, rungs in data["systems"].items()]
    lines += ["", "## Reports of real devices", ""]
    for name, about in data["reports"].items():
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(about["counts"].items()))
        lines.append(f"- `{name}`: {about['device']}, torch {about['torch']}, {about['written']}: {counts}")
    for name, battery in read_batteries().items():
        rows = battery["ops"].values()
        failed = [test for row in rows for test in row["failed"]]
        passed = sum(row["passed"] for row in rows)
        lines.append(
            f"- `{name}`: {battery['device']}, torch {battery['torch']}, {battery['date']}: {passed} passed, "
            f"{len(failed)} failed, whose ops claim no rung. {battery['note']}"
        )
    return "\n".join(lines) + "\n"


def never_run(used: set[str]) -> list[str]:
    """What no rung of the table stands for."""
    lines = ["## What was never run", ""]
    if "7" not in used:
        lines.append(
            "Nothing was ever run on an Ascend device. Rungs 1 to 6 say nothing about the vendor's numerics, its "
            "compiler's verdict on our kernels, races between its pipes, collectives of HCCL, or speed. On a machine "
            "that has one, `python npu_kernels/on_device/run.py` checks and measures everything and writes a report; "
            "kept in `npu_kernels/on_device/results`, it fills rung 7."
        )
    if "G" not in used:
        lines.append("No report of a GPU is kept, so none of its rungs is claimed.")
    return [*lines, ""] if len(lines) > 2 else []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JUnit files of runs of the tests")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where this run contradicts the page")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results = {name: outcome for path in options.results for name, outcome in read_results(path).items()}
    found = collect(results, read_reports())
    if options.check:
        return check(json.loads(DATA.read_text()), found)
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(render(found))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def check(written: dict[str, Any], found: dict[str, Any]) -> int:
    """What the page claims and this run does not bear out; outside of CI, tests may have been skipped."""
    missing = []
    for part in ("ops", "systems"):
        for name, row in written[part].items():
            cells = row.items() if part == "ops" else [("", row)]
            for column, rungs in cells:
                now = found[part].get(name, {})
                now = now.get(column, []) if part == "ops" else now
                missing += [f"{name} {column}: rung {rung}" for rung in rungs if rung not in now]
    for claim in missing:
        print(f"docs/support_matrix.md: {claim} is not borne out by this run")
    if missing and not os.environ.get("CI"):
        print("outside of CI this is no error: tests may have been skipped")
        return 0
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
