# SPDX-License-Identifier: Apache-2.0
"""The report of a run: a summary for each op and backend, everything that did not pass, times; as JSON and to read."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

GOOD = ("passed", "refused")


def summarise(facts: dict[str, Any], results: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Facts about the machine, ``rows`` by kind, op and backend (or system and part), ``failures`` and ``times``."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in (r for r in results if not r["case"].startswith("bench/")):
        parts = tuple(result["case"].split("/"))
        key = parts[: 3 if parts[0] in ("models", "dispatch") else 4]
        new = {"verdicts": Counter(), "worst": 0.0, "error": 0.0, "refusals": Counter(), "backends": Counter()}
        row = rows.setdefault(key, new)
        row["backends"].update([result["backend"]] if "backend" in result else [])
        row["verdicts"][result["verdict"]] += 1
        if result["verdict"] == "refused":
            row["refusals"][result["why"]] += 1
        ratio = result.get("error", 0.0) / max(result.get("bound", 0.0), 1e-300)
        if ratio > row["worst"]:
            row["worst"], row["error"] = ratio, result["error"]
    counts = Counter(result["verdict"] for result in results)
    return {
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **about,
        "all_passed": all(verdict in GOOD for verdict in counts) and not about["missing"],
        "counts": dict(counts),
        "facts": facts,
        "rows": [
            {
                "case": "/".join(key),
                **row,
                "verdicts": dict(row["verdicts"]),
                "refusals": dict(row["refusals"]),
                "backends": dict(row["backends"]),
            }
            for key, row in rows.items()
        ],
        "failures": [result for result in results if result["verdict"] not in GOOD],
        "times": [result for result in results if "ms" in result],
    }


def write(summary: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(summary), encoding="utf-8")


def verdict_line(summary: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(summary["counts"].items()))
    missing = f", {summary['missing']} not run" if summary["missing"] else ""
    where = "EMULATED, which says nothing about a device: " if summary["emulated"] else ""
    return f"{where}{counts or 'nothing ran'}{missing}"


def markdown(summary: dict[str, Any]) -> str:
    facts = summary["facts"]
    lines = [f"# vidgen on {facts['measured on']}", "", verdict_line(summary), "", f"Written {summary['written']}."]
    lines += ["", "## Machine", ""]
    known = {**facts["versions"], **facts["software"], "platform": facts["platform"]}
    lines += [f"- {name}: {value}" for name, value in known.items() if value is not None]
    lines += [f"- problem: {problem}" for problem in facts["problems"]]
    set_here = {v["name"]: v["value"] for v in facts["variables"] if v["value"] is not None}
    lines += [f"- {name}={value}" for name, value in set_here.items()]
    lines += ["", "## Kernels in Ascend C", "", build_line(summary["build"])]
    lines += ["", "## Accuracy", "", "Worst is the error as a share of what is allowed; 1 is the bound.", ""]
    lines += ["| case | passed | refused | other | worst | error |", "|---|---|---|---|---|---|"]
    for row in summary["rows"]:
        verdicts = row["verdicts"]
        other = {verdict: count for verdict, count in verdicts.items() if verdict not in GOOD}
        said = ", ".join(f"{count} {verdict}" for verdict, count in other.items()) or "0"
        numbers = f"{verdicts.get('passed', 0)} | {verdicts.get('refused', 0)} | {said}"
        taken = ", ".join(f"{count} {backend}" for backend, count in row["backends"].items())
        name = f"{row['case']} ({taken})" if taken else row["case"]
        lines.append(f"| {name} | {numbers} | {row['worst']:.2g} | {row['error']:.2g} |")
    lines += ["", "## What did not pass", ""]
    lines += [f"- `{f['case']}`: {f['verdict']}: {f.get('why', '')}" for f in summary["failures"]] or ["Nothing."]
    lines += ["", "## What was refused", ""]
    lines += refusals(summary) or ["Nothing."]
    return "\n".join([*lines, *times(summary), ""])


def refusals(summary: dict[str, Any]) -> list[str]:
    """Each reason once, with the cases that it is given for."""
    reasons: dict[str, list[str]] = {}
    for row in summary["rows"]:
        for reason, count in row["refusals"].items():
            reasons.setdefault(reason, []).append(f"{row['case']} ({count})")
    return [f"- {reason}: {', '.join(cases)}" for reason, cases in reasons.items()]


def build_line(build: dict[str, Any]) -> str:
    if "skipped" in build:
        return f"Not built: {build['skipped']}."
    made = "the library is there" if build["library"] else "there is NO library"
    facts = f"{made}, exit code {build['exit code']}, {build['seconds']} s"
    return f"{facts}; the end of what the build said is in report.json, all of it in build.log."


def times(summary: dict[str, Any]) -> list[str]:
    """Milliseconds of each backend; ratios are to eager PyTorch on the same device and to a copy of the same bytes."""
    if not summary["times"]:
        return ["", "## Times", "", "Not measured."]
    backends: dict[str, None] = {}
    for row in summary["times"]:
        backends |= {name: None for name in row["ms"] if name not in ("eager", "copy")}
    lines = ["", "## Times", "", "ms, x eager PyTorch on the device, share of the speed of a copy", ""]
    lines.append("| op | dtype | shape | " + " | ".join([*backends, "eager", "copy"]) + " |")
    lines.append("|" + "---|" * (len(backends) + 5))
    for row in summary["times"]:
        _, op, dtype, shape = row["case"].split("/", 3)
        cells = [cell(row["ms"], name) for name in backends]
        plain = [f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in ("eager", "copy")]
        lines.append(f"| {op} | {dtype} | {shape} | " + " | ".join([*cells, *plain]) + " |")
    return lines


def cell(ms: dict[str, float], name: str) -> str:
    if name not in ms:
        return ""
    parts = [f"{ms[name]:.3f}"]
    parts += [f"{ms['eager'] / ms[name]:.2f}x"] if "eager" in ms and ms[name] else []
    parts += [f"{ms['copy'] / ms[name]:.2f}"] if ms[name] else []
    return ", ".join(parts)
