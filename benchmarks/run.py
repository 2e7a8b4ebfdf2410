# SPDX-License-Identifier: Apache-2.0
"""Measures the ops against what users would run without them; see ``--help``.

Starts itself anew with the settings that its figures are defined for, then measures (measure.py) and reports
(report.py).
"""

import argparse
import os
import sys
from pathlib import Path

SETTINGS = {
    # Memory is kept and used again, as long-running programs and good allocators do: with the C library's defaults
    # every large result is mapped and paged in anew, which costs more than most of these ops.
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    # A fallback would be measured under a kernel's name.
    "VIDGEN_STRICT": "1",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Ratios of each op to eager PyTorch as the original systems write it, to torch.compile of that, "
        "and to the roofline, all measured in turns in one run. Updates csv, table and chart in the output folder.",
    )
    parser.add_argument("--op", action="append", help="only this op (may be given again)")
    parser.add_argument(
        "--dtype", action="append", choices=("bfloat16", "float32", "float16"), help="default: first two"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu (default: cpu)")
    parser.add_argument(
        "--threads",
        type=int,
        action="append",
        help="may be given again; 1 counts process CPU time, more wall clock (default: 1 and 2 on a CPU, else 1)",
    )
    parser.add_argument("--quick", action="store_true", help="first workload of each op, 1 thread, no torch.compile")
    parser.add_argument(
        "--part",
        choices=("ops", "attention"),
        help="of an accelerator's figures only these (default: both; on a CPU attention is one of the ops)",
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    arguments = parser.parse_args()
    both = arguments.device == "cpu" and not arguments.quick and (os.cpu_count() or 1) > 1
    arguments.threads = arguments.threads or ([1, 2] if both else [1])
    return arguments


def main() -> int:
    arguments = parse()
    if os.environ.get("VIDGEN_BACKEND"):
        sys.exit("benchmarks/run.py: unset VIDGEN_BACKEND: a forced backend is not what users get")
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        environment = {**os.environ, **SETTINGS, "OMP_NUM_THREADS": str(max(arguments.threads))}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)

    return measure_all(arguments)


def measure_all(arguments: argparse.Namespace) -> int:
    import attention
    import measure
    import report

    tables = []
    if arguments.part != "attention":
        rows = []
        for row in measure.measure_all(arguments):
            rows.append(row)
            report.write(rows, arguments.output)  # after each: a run that is stopped keeps what it has
        if not rows:
            sys.exit("benchmarks/run.py: nothing was measured")
        stored = arguments.output / report.file_name(rows[0], ".csv")
        report.chart(stored)
        stored.with_suffix(".md").write_text(
            "\n\n".join([*measure.reached, report.markdown(report.read(stored))]) + "\n"
        )
        tables += [*measure.reached, report.markdown(rows)]
    if arguments.part == "attention" or (arguments.device != "cpu" and not arguments.op and not arguments.part):
        rows = list(attention.measure(arguments))
        stored = arguments.output / report.file_name(rows[0], "_attention.csv")
        report.write_table(rows, attention.COLUMNS, stored)
        tables.append(report.table(rows, attention.COLUMNS))
    failed = measure.failed + attention.failed
    print("\n\n".join([*tables, *([f"failed: {', '.join(failed)}"] if failed else [])]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
