# SPDX-License-Identifier: Apache-2.0
"""The figures as csv, one file per device, as a chart beside it and as a markdown table."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "op",
    "dtype",
    "shape",
    "threads",
    "capability",
    "device",
    "torch",
    "median_ms",
    "ratio_to_eager",
    "ratio_to_compile",
    "ratio_to_roofline",
)
ACCELERATOR_COLUMNS = (
    "op",
    "dtype",
    "shape",
    "device",
    "torch",
    "median_us",
    "gb_per_s",
    "share_of_copy",
    "ratio_to_eager",
    "ratio_to_compile",
    "ratio_to_liger",
    "ratio_to_roofline",
)
# A new figure takes the place of an old one with the same key.
KEY = ("op", "dtype", "shape", "threads", "capability", "device")

Row = dict[str, Any]


def file_name(row: Row, suffix: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", row["device"].lower()).strip("_") + suffix


def write(rows: list[Row], folder: Path) -> Path:
    """Put ``rows``, all of one device, into its csv, and keep what else is in there."""
    path = folder / file_name(rows[0], ".csv")
    known = {tuple(str(row.get(column, "")) for column in KEY): row for row in (*read(path), *rows)}
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(rows[0]))
        writer.writeheader()
        writer.writerows(known[key] for key in sorted(known))
    return path


def write_table(rows: list[Row], columns: Sequence[str], path: Path) -> None:
    """A table of its own, as csv and markdown; takes the place of an earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*columns, "device", "torch"))
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".md").write_text(f"{rows[0]['device']}, torch {rows[0]['torch']}\n\n{table(rows, columns)}\n")


def columns_of(row: Row) -> tuple[str, ...]:
    return COLUMNS if "threads" in row else ACCELERATOR_COLUMNS


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[Row]) -> str:
    """Times of CPUs depend too much on the machine's other work to be printed: ratios do not."""
    columns = [c for c in columns_of(rows[0]) if c not in ("device", "torch", "median_ms")]
    title = (
        f"{rows[0]['device']}, torch {rows[0]['torch']}; ratios above 1: this op is faster "
        "(roofline: share of it that is reached)"
    )
    return f"{title}\n\n{table(rows, columns)}"


def table(rows: list[Row], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row[c]) or "-" for c in columns) + " |" for row in rows])


def threads(row: Row) -> str:
    return f", {row['threads']} thr." if "threads" in row else ""


def chart(path: Path) -> Path | None:
    """Bars of the ratios to eager and to torch.compile on one thread in the csv at ``path``, beside it as png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("benchmarks: no chart, matplotlib is missing (pip install 'vidgen[train]')", file=sys.stderr)
        return None
    fewest = min(int(row.get("threads", 1)) for row in read(path))
    rows = [row for row in read(path) if int(row.get("threads", 1)) == fewest]
    figure = Figure(figsize=(10, 1 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for offset, column, label in ((-0.2, "ratio_to_eager", "eager"), (0.2, "ratio_to_compile", "torch.compile")):
        values = [float(row[column] or "nan") for row in rows]
        bars = axes.barh([p + offset for p in places], values, height=0.4, label=f"times as fast as {label}")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    labels = [f"{row['op']}  {row['shape']}  {row['dtype']}{threads(row)}" for row in rows]
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.legend(fontsize=7)
    axes.set_title(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    return path.with_suffix(".png")
