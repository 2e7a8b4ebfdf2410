# SPDX-License-Identifier: Apache-2.0
"""The figures as csv, one file per device, as a chart beside it and as a markdown table."""

from __future__ import annotations

import csv
import re
import sys
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
KEY = COLUMNS[:6]  # a new figure takes the place of an old one with the same key

Row = dict[str, Any]


def file_name(row: Row, suffix: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", row["device"].lower()).strip("_") + suffix


def write(rows: list[Row], folder: Path) -> Path:
    """Put ``rows``, all of one device, into its csv, and keep what else is in there."""
    path = folder / file_name(rows[0], ".csv")
    known = {tuple(str(row[column]) for column in KEY): row for row in (*read(path), *rows)}
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(known[key] for key in sorted(known))
    return path


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[Row]) -> str:
    """Times of CPUs depend too much on the machine's other work to be printed: ratios do not."""
    timed = not rows[0]["capability"]
    columns = [c for c in COLUMNS if c not in ("device", "torch") and (timed or c != "median_ms")]
    lines = [
        f"{rows[0]['device']}, torch {rows[0]['torch']}; ratios above 1: this op is faster "
        "(roofline: share of it that is reached)",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    lines += ["| " + " | ".join(str(row[c]) or "-" for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def chart(path: Path) -> Path | None:
    """Bars of the ratios to eager and to torch.compile on one thread in the csv at ``path``, beside it as png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("benchmarks: no chart, matplotlib is missing (pip install 'vidgen[train]')", file=sys.stderr)
        return None
    fewest = min(int(row["threads"]) for row in read(path))
    rows = [row for row in read(path) if int(row["threads"]) == fewest]
    figure = Figure(figsize=(10, 1 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for offset, column, label in ((-0.2, "ratio_to_eager", "eager"), (0.2, "ratio_to_compile", "torch.compile")):
        values = [float(row[column] or "nan") for row in rows]
        bars = axes.barh([p + offset for p in places], values, height=0.4, label=f"times as fast as {label}")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    labels = [f"{row['op']}  {row['shape']}  {row['dtype']}, {row['threads']} thr." for row in rows]
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.legend(fontsize=7)
    axes.set_title(f"{rows[0]['device']}, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    return path.with_suffix(".png")
