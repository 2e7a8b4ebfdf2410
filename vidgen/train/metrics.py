# SPDX-License-Identifier: Apache-2.0
"""What a run tells about itself while it runs: ``metrics.jsonl``, the loss plot, the progress on the screen."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgen.io import atomic_path, atomic_write

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per line to a file, each line flushed, so that a killed run keeps all that it wrote."""

    def __init__(self, path: str | Path, *, last_step: int = 0) -> None:
        """Open ``path``; records of steps after ``last_step`` come from a run that went on and was lost: dropped."""
        path = Path(path)
        if path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= last_step]
            with atomic_write(path, "w") as file:
                file.writelines(_line(record) for record in kept)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._waiting = b""

    def write(self, record: Mapping[str, Any]) -> None:
        """Append ``record``; numbers that are not finite become null, for which JSON has no other word.

        Lines that the disk has no room for wait in memory for the next call: a full disk must not end a run.
        """
        self._waiting += _line(record).encode()
        good = self._file.tell()
        try:
            written = self._file.write(self._waiting)
        except OSError as error:
            logger.warning("%s: %s; its lines wait in memory", self._file.name, error)
            return
        if written == len(self._waiting):
            self._waiting = b""
        else:
            self._file.truncate(good)

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a kill has cut off is left out.

    Raises:
        ValueError: a line before the last is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # a complete file ends with a newline
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"read_metrics: {path} line {number}: {error}") from error
    return records


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over up to ``window`` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, i + 1 - window) for i in range(len(values))]
    return [(sums[i + 1] - sums[start]) / (i + 1 - start) for i, start in enumerate(starts)]


def plot_loss(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw loss and gradient norm over the steps as a PNG file; steps that were skipped are marked."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no display
    except ImportError as error:
        raise ImportError("plot_loss: plots need matplotlib: pip install 'vidgen[train]'") from error
    good = [r for r in records if r.get("loss") is not None and not r.get("skipped")]
    figure = Figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2, gridspec_kw={"left": 0.08, "right": 0.97, "bottom": 0.13, "top": 0.85})
    for axes, name in ((left, "loss"), (right, "grad_norm")):
        points = [(r["step"], r[name]) for r in good if r.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1)
            axes.plot(steps, smoothed(values, max(1, len(values) // 20)), color="tab:blue", linewidth=1.8)
            if min(values) > 0:
                axes.set_yscale("log")
        for record in records:
            if record.get("skipped"):
                axes.axvline(record["step"], color="tab:red", linewidth=1)
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.grid(True, alpha=0.3)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


class Progress:
    """A progress bar on a terminal, plain lines every ``every`` steps elsewhere; nothing at all if ``silent``."""

    def __init__(
        self, total: int, *, start: int = 0, every: int = 10, unit: str = "step", silent: bool = False
    ) -> None:
        self.total, self.every, self.unit, self.silent = total, max(1, every), unit, silent
        self._began, self._start = time.monotonic(), start
        self._bar: Any = None
        if sys.stderr.isatty() and not silent:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("the progress bar needs tqdm: pip install 'vidgen[train]'") from error
            self._bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True)

    def update(self, step: int, **values: float) -> None:
        """Report that ``step`` (counted from 1) is done."""
        if self.silent:
            return
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.every == 0 or step == self.total:
            rate = (time.monotonic() - self._began) / max(1, step - self._start)
            left = rate * (self.total - step)
            print(f"{self.unit} {step}/{self.total} {shown} ({rate:.2f} s each, {left:.0f} s left)", flush=True)

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
