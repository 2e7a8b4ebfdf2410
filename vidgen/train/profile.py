# SPDX-License-Identifier: Apache-2.0
"""Where the time of training steps goes: a trace, the arithmetic of a step, and what share of the peak it reached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vidgen import device as devices
from vidgen import ops
from vidgen.io import atomic_path, atomic_write, write_json

AHEAD = 2  # steps before those in the trace: in one the arithmetic is counted, in one the profiler warms up


class StepProfiler:
    """Writes ``trace.json.gz``, ``summary.json`` and more into ``folder`` once ``steps`` steps have been seen.

    Every step of the run is to be taken inside ``with profiler.step():``; the first two are not in the trace.

    Raises:
        ValueError: the run is too short.
    """

    def __init__(self, device: torch.device, folder: Path, steps: int, left: int, *, recomputes: bool) -> None:
        if steps < 1 or left < steps + AHEAD:
            raise ValueError(f"--profile: {steps} steps need {max(steps, 1) + AHEAD} to be left, there are {left}")
        self.device, self.folder, self.steps, self.recomputes = device, folder, steps, recomputes
        self.seen, self.seconds = 0, 0.0
        self.flops = FlopCount()
        folder.mkdir(parents=True, exist_ok=True)
        library, activities = devices.profiler(device)
        self._profiler = library.profile(
            activities=activities,
            schedule=library.schedule(wait=1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write if library is torch.profiler else library.tensorboard_trace_handler(str(folder)),
            record_shapes=True,
        )

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step of training; later than the last one of the trace it does nothing."""
        if self.seen >= self.steps + AHEAD:
            yield
            return
        if self.seen == 0:
            self._profiler.start()
        with self.flops if self.seen == 0 else contextlib.nullcontext():
            yield
        self.seen += 1
        self._profiler.step()
        if self.seen == self.steps + AHEAD:
            self._profiler.stop()

    def note(self, step: int, seconds: float) -> None:
        """Which step that was, and how long it took; after the last one of the trace the summary is written."""
        if AHEAD < self.seen <= self.steps + AHEAD:
            self.seconds += seconds / self.steps
        if self.seen == self.steps + AHEAD:
            self.seen += 1
            write_json(self.folder / "summary.json", self.summary(step))
            with atomic_write(self.folder / "README.md", "w") as file:
                file.write(README)

    def summary(self, last: int) -> dict[str, Any]:
        """``mfu`` is None where the peak is unknown, some arithmetic cannot be counted, or some is done twice."""
        peak = devices.peak_flops(self.device)
        sound = peak is not None and not self.flops.unknown and not self.recomputes
        return {
            "device": devices.describe(self.device),
            "steps": [last - self.steps + 1, last],
            "seconds_per_step": round(self.seconds, 6),
            "flops_per_step": self.flops.total,
            "flops_not_counted": sorted(self.flops.unknown),
            "flops_include_recomputation": self.recomputes,
            "peak_flops": peak and peak[0],
            "peak_source": peak and peak[1],
            "mfu": self.flops.total / self.seconds / peak[0] if peak is not None and sound else None,
        }

    def close(self) -> None:
        """End early; nothing is written."""
        if 0 < self.seen < self.steps + AHEAD:
            self._profiler.stop()

    def _write(self, profiler: Any) -> None:
        with atomic_path(self.folder / "trace.json.gz") as temporary:
            profiler.export_chrome_trace(str(temporary))
        key = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        with atomic_write(self.folder / "ops.txt", "w") as file:
            file.write(profiler.key_averages().table(sort_by=key, row_limit=60))


README = """# Where the time of these steps went

- `trace.json.gz`: open it at https://ui.perfetto.dev or chrome://tracing. On Ascend it is the folder `*_ascend_pt`:
  open it in MindStudio Insight, or its `ASCEND_PROFILER_OUTPUT/trace_view.json` like the above.
- `ops.txt`: operators by their own time (not on Ascend).
- `summary.json`: seconds of a step under the profiler, which slows it; the arithmetic of matrix products, convolutions
  and attention in a step; `mfu`, its share of the device's peak, where both are known.
"""


class FlopCount(TorchDispatchMode):
    """Counts the arithmetic of matrix products, convolutions and attention while it is active.

    ``unknown`` names operators of other libraries, whose arithmetic nobody states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name.startswith("vidgen::"):
            # The forms that write into a given tensor, and those that kernels call, are never seen from here.
            op = ops.OPS.get(name.removeprefix("vidgen::"))
            self.total += 0 if op is None else op.cost(*args).flops
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        elif name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            self.total += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            self.total += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif func.namespace not in ("aten", "prim", "prims", "profiler"):
            self.unknown.add(name)
        return result
