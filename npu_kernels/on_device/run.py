# SPDX-License-Identifier: Apache-2.0
"""One command for a machine with an accelerator: builds, checks every op and model, measures, writes one report.

    python npu_kernels/on_device/run.py [--device npu] [--output on_device_report]

Each group of cases runs in a process of its own, so that a kernel that goes wrong ends that process and not the report.
Started again, it goes on after the last finished case. To send back: report.json (report.md says the same to a reader).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CASES = "cases.jsonl"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="npu", help="npu (default), cuda or cpu, with an index if need be")
    parser.add_argument("--output", type=Path, default=Path("on_device_report"), help="folder, default %(default)s")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="cases such as 'values/haar_*', 'models/*'; may be repeated"
    )
    parser.add_argument("--skip-bench", action="store_true", help="no times")
    parser.add_argument("--skip-build", action="store_true", help="take the kernels in Ascend C as they are")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of one case, default %(default)s")
    parser.add_argument("--again", action="store_true", help="forget what is done; begin anew")
    parser.add_argument("--emulate", action="store_true", help="no device: test this program with the one of tests/npu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0: all passed; 1: something failed, crashed or raised; 2: it could not begin."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.again:
        (options.output / CASES).unlink(missing_ok=True)
    if options.emulate or options.skip_build or not options.device.startswith("npu"):
        built = {"skipped": "not asked for, or not for this device"}
    else:
        built = build(options.output)
    asked = subprocess.run(command(options, "--list"), capture_output=True, text=True, cwd=ROOT)
    if asked.returncode:
        print(asked.stderr[-3000:], file=sys.stderr)
        print("run.py: the device cannot be used; see above", file=sys.stderr)
        return 2
    facts, _, names = asked.stdout.partition("\nCASES\n")
    wanted = [name for name in names.splitlines() if selected(name, options)]
    done = finished(options.output / CASES)
    groups = grouped([name for name in wanted if name not in done])
    total, count = len(wanted), len([name for name in wanted if name in done])
    with open(options.output / CASES, "a", encoding="utf-8") as file:
        for group, names in groups.items():
            for result in run_group(names, options):
                file.write(json.dumps(result) + "\n")
                file.flush()
                count += 1
                if result["verdict"] not in ("passed", "refused"):
                    print(f"{result['case']}: {result['verdict']}: {result.get('why')}", flush=True)
            print(f"[{count}/{total}] {group}", flush=True)
    results = [result for name, result in finished(options.output / CASES).items() if name in set(wanted)]
    about = {"emulated": options.emulate, "device": options.device, "build": built, "missing": total - len(results)}
    summary = report.summarise(json.loads(facts.splitlines()[-1]), results, about)
    report.write(summary, options.output)
    print(f"wrote {options.output / 'report.json'} and report.md")
    print(report.verdict_line(summary))
    return 0 if summary["all_passed"] else 1


def selected(name: str, options: argparse.Namespace) -> bool:
    if options.skip_bench and name.startswith("bench/"):
        return False
    return options.only is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in options.only)


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Results so far; a last line that was cut off is removed."""
    found = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for line in lines[:-1]:
        result = json.loads(line)
        found[result["case"]] = result
    if lines and lines[-1]:
        path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    return found


def grouped(names: list[str]) -> dict[str, list[str]]:
    """By kind and op or system."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("/".join(name.split("/")[:2]), []).append(name)
    return groups


def command(options: argparse.Namespace, *more: str) -> list[str]:
    emulate = ["--emulate"] if options.emulate else []
    return [sys.executable, str(HERE / "cases.py"), "--device", options.device, *emulate, *more]


def run_group(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result for each case; where the process ends or hangs, the next one goes on behind the case that did it."""
    waiting = list(names)
    while waiting:
        running: str | None = None
        log = options.output / "last_process.log"
        with open(log, "wb") as errors:
            process = subprocess.Popen(
                command(options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
            )
            assert process.stdin is not None
            lines = lines_of(process)
            with_all = "".join(f"{name}\n" for name in waiting)
            threading.Thread(target=feed, args=(process, with_all), daemon=True).start()
            ended = "the process ended"
            while waiting:
                try:
                    line = lines.get(timeout=options.timeout)
                except queue.Empty:
                    ended = f"no answer within {options.timeout:.0f} s"
                    process.kill()
                    break
                if line is None:
                    break
                word, _, rest = line.partition(" ")
                if word == "begin":
                    running = rest.strip()
                elif word == "end" and running is not None:
                    yield json.loads(rest)
                    waiting.remove(running)
                    running = None
            process.stdin.close()
            code = process.wait()
        if waiting:
            name = running or waiting[0]
            verdict = "timed out" if ended.startswith("no answer") else "crashed"
            why = f"{ended} (exit code {code})" + ("" if running else " before its first case")
            yield {"case": name, "verdict": verdict, "why": why, "trace": tail(log)}
            waiting.remove(name)


def feed(process: subprocess.Popen[str], text: str) -> None:
    """From a thread: a pipe holds only so much, and the process may be gone."""
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.flush()
    except (BrokenPipeError, ValueError):
        pass


def lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """Lines of the process as they come, then None."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-12:]


def build(output: Path) -> dict[str, Any]:
    """Compile the kernels in Ascend C where CANN is; what was said is part of the report."""
    if not os.environ.get("ASCEND_HOME_PATH"):
        return {"skipped": "ASCEND_HOME_PATH is not set: no CANN, no kernels in Ascend C"}
    if shutil.which("cmake") is None:
        return {"skipped": "cmake is missing: pip install cmake ninja"}
    folder, began, said = ROOT / "build" / "npu", time.monotonic(), ""
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    steps = (
        ["cmake", "-S", str(HERE.parent), "-B", str(folder), *ninja, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder), "--parallel"],
        ["cmake", "--install", str(folder), "--prefix", str(ROOT / "vidgen")],
    )
    for step in steps:
        ran = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said += f"$ {' '.join(step)}\n{ran.stdout}"
        if ran.returncode:
            break
    (output / "build.log").write_text(said)
    made = (ROOT / "vidgen" / "_ascendc.so").exists()
    seconds = round(time.monotonic() - began, 1)
    return {"exit code": ran.returncode, "library": made, "seconds": seconds, "said": said.splitlines()[-60:]}


if __name__ == "__main__":
    sys.exit(main())
