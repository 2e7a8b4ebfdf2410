# SPDX-License-Identifier: Apache-2.0
"""Timing in turns on an accelerator, by its own events: what its kernels take, without the launches before them.

Before each timed call the cache is overwritten, so that figures are those of memory, and the device is kept busy
until the host has queued the call.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch
from originals import Step

FLUSHED = 256 * 2**20  # bytes; several times the second-level cache of any of today's devices
BUSY = 2_000_000  # clock cycles, about a millisecond
SECONDS_PER_ROW = 1.0
ROUNDS = range(5, 26)


class HostEvent:
    """An event of a CPU, whose work is done when the call returns: for tests."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


class Watch:
    """Times single calls on ``device``; results are there after :meth:`seconds`, which waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.module: Any = torch.get_device_module(device) if device.type != "cpu" else None
        self.event: Any = self.module.Event if self.module else HostEvent
        self.flushed = torch.empty(FLUSHED if self.module else 2**20, dtype=torch.int8, device=device)

    def time(self, step: Step) -> tuple[Any, Any]:
        self.flushed.zero_()
        if self.module is not None and hasattr(self.module, "_sleep"):
            self.module._sleep(BUSY)
        start, end = self.event(enable_timing=True), self.event(enable_timing=True)
        start.record()
        step()
        end.record()
        return start, end

    def seconds(self, timed: list[tuple[Any, Any]]) -> list[float]:
        if self.module is not None:
            self.module.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in timed]


def in_turns(candidates: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Median seconds of each."""
    watch = Watch(device)
    for step in candidates.values():
        step()
    once = watch.seconds([watch.time(step) for step in candidates.values()])
    rounds = min(ROUNDS[-1], max(ROUNDS[0], round(SECONDS_PER_ROW / (sum(once) + 2e-3 * len(once)))))
    timed = [[watch.time(step) for step in candidates.values()] for _ in range(rounds)]
    seconds = [watch.seconds(turn) for turn in timed]
    return {name: statistics.median(turn[i] for turn in seconds) for i, name in enumerate(candidates)}


def peaks(device: torch.device, dtype: torch.dtype, size: int = 8192, moved: int = 2 * 2**30) -> dict[str, float]:
    """What this device reaches: bytes per second of a large copy, read and written, and FLOP/s of a large matmul."""
    source = torch.randn(moved // 4, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device)
    return {"copy": 2 * source.numel() * 2 / times["copy"], "matmul": 2 * size**3 / times["matmul"]}


@contextlib.contextmanager
def forgotten_memory(device: torch.device) -> Any:
    """Give memory back after a row, which may have been most of the device's."""
    try:
        yield
    finally:
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
