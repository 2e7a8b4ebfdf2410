# SPDX-License-Identifier: Apache-2.0
"""Timing in turns: in every round each candidate once, and of each candidate the median over the rounds.

On a CPU by its clocks, here; on an accelerator by its events (device_timing.py), on other sizes (workloads.py).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import device_timing
import liger
import torch
import workloads as accelerator
from originals import ORIGINALS, Original, Step, bind, relative_error, tolerance

from vidgen import device as devices
from vidgen import ops

MATMUL_SIZE = {"cpu": 1024}  # large enough for the peak; accelerators: 8192
SECONDS_PER_TURN = 0.02  # fast candidates run several times in a turn
SECONDS_PER_ROW = 2.5  # slow ones fewer rounds
ROUNDS = range(3, 10)
failed: list[str] = []
reached: list[str] = []  # what an accelerator's memory and matrix units reached


def measure_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every op, dtype, workload and number of threads asked for.

    What does not equal its original is refused and listed. Fewer threads come first: idle ones of a pool would still be
    counted where the time of the whole process is. torch.compile, which takes longer to compile than everything else
    together takes to measure, is compared with on the first number of threads.
    """
    device = devices.resolve(arguments.device)
    dtypes = arguments.dtype or (("bfloat16",) if is_accelerator(device) else ("bfloat16", "float32"))
    shapes = {dtype: shapes_for(device, getattr(torch, dtype)) for dtype in dtypes}
    known = sorted(shapes[dtypes[0]])
    if unknown := [name for name in arguments.op or () if name not in known]:
        sys.exit(f"benchmarks/run.py: no op {unknown[0]!r}; there are {', '.join(known)}")
    planned = [
        (threads, name, dtype, shape)
        for threads in sorted(arguments.threads)
        for name in arguments.op or known
        for dtype in dtypes
        for shape in list(shapes[dtype][name])[: 1 if arguments.quick else None]
    ]
    peaks = {dtype: device_timing.peaks(device, getattr(torch, dtype)) for dtype in dtypes if is_accelerator(device)}
    reached[:] = [
        f"copy {peak['copy'] / 1e9:.0f} GB/s, {dtype} matmul {peak['matmul'] / 1e12:.0f} TFLOP/s"
        for dtype, peak in peaks.items()
    ]
    start = time.perf_counter()
    for done, (threads, name, dtype, shape) in enumerate(planned):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        compiled = not arguments.quick and threads == min(arguments.threads)
        try:
            with torch.no_grad(), device_timing.forgotten_memory(device):
                args = shapes[dtype][name][shape]()
                times = measure(name, args, clock_for(device, threads), device, compiled)
                moved = ops.OPS[name].cost(*args).bytes
        except Exception as error:  # of any library below: the other rows are still worth having
            times = None
            failed.append(name)
            print(f"{name} {shape}: {type(error).__name__}: {str(error).strip()[:500]}", file=sys.stderr)
        found = None
        if times is not None:
            found = row(name, dtype, shape, threads, device, times)
            if is_accelerator(device):
                found = accelerator_row(found, times, moved, peaks[dtype]["copy"])
        minutes = (time.perf_counter() - start) / 60
        result = f"{found['ratio_to_eager']} x eager" if found else "no figures"
        print(
            f"[{done + 1}/{len(planned)}, {minutes:.1f} min] {name} {dtype} {shape}, threads {threads}: {result}",
            file=sys.stderr,
            flush=True,
        )
        if found is not None:
            yield found


def is_accelerator(device: torch.device) -> bool:
    """Whether figures are those of device_timing.py and workloads.py."""
    return device.type != "cpu"


def shapes_for(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """``{op: {shape: make the arguments}}``."""
    if is_accelerator(device):
        return accelerator.workloads(device, dtype)
    return {name: ops.OPS[name].workloads(device, dtype) for name in ORIGINALS}


def measure(
    name: str, args: tuple[Any, ...], clock: Callable[[], float], device: torch.device, compare_compiled: bool
) -> dict[str, float] | None:
    """Seconds of ``ours`` and ``eager``, of ``compile`` and ``liger`` where these work, and ``roofline``."""
    op, original = ops.OPS[name], ORIGINALS[name]
    if (verdict := op.explain(*args).splitlines()[0]) and not verdict.endswith(": runs"):
        print(f"{name}: {verdict}: no kernel to measure ({args[0].dtype})", file=sys.stderr)
        return None
    candidates: dict[str, Step] = {"ours": lambda: op(*args), "eager": bind(original, args)}
    # Sums of originals that round at each step may go astray: then what counts is the truth.
    if not agrees(name, op(*args), (candidates["eager"], lambda: in_float32(name, args)), args[0].dtype):
        return None
    if compare_compiled and (compiled := compile_original(name, original, args)) is not None:
        candidates["compile"] = compiled
    if device.type == "cuda" and (theirs := liger_step(name, args)) is not None:
        candidates["liger"] = theirs
    cost = op.cost(*args)
    candidates["copy"] = copy_step(cost.bytes, args[0])
    if cost.flops:
        size = MATMUL_SIZE.get(device.type, 8192)
        a, b = (torch.randn(size, size, device=device, dtype=args[0].dtype) for _ in range(2))
        candidates["matmul"] = lambda: a @ b
    times = device_timing.in_turns(candidates, device) if is_accelerator(device) else in_turns(candidates, clock)
    by_flops = times["matmul"] * cost.flops / (2 * size**3) if cost.flops else 0.0
    return {**times, "roofline": max(times["copy"], by_flops)}


def agrees(name: str, result: Any, others: Iterable[Callable[[], Any]], dtype: torch.dtype) -> bool:
    """Whether ``result`` is near one of the others."""
    errors = []
    for other in others:
        errors.append(relative_error(other(), result))
        if errors[-1] <= tolerance(dtype):
            return True
    failed.append(name)
    print(f"{name}: off by {min(errors):.1e} ({dtype}); no figures", file=sys.stderr)
    return False


def in_float32(name: str, args: tuple[Any, ...]) -> Any:
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return ops.OPS[name].reference(*wide)


def compile_original(name: str, original: Original, args: tuple[Any, ...]) -> Step | None:
    torch._dynamo.reset()
    # One forward serves many backward passes here.
    with torch._functorch.config.patch(donated_buffer=False):
        try:
            step = bind(original, args, lambda run: torch.compile(run, dynamic=False))
            compiled = step()
        except RuntimeError as error:  # what torch.compile, its code generation and its C++ compiler raise
            print(f"{name}: torch.compile fails: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            return None
    others = (bind(original, args), lambda: ops.OPS[name](*args))
    return step if agrees(f"torch.compile of {name}", compiled, others, args[0].dtype) else None


def liger_step(name: str, args: tuple[Any, ...]) -> Step | None:
    try:
        step = liger.step_for(name, args)
        result = None if step is None else step()
    except Exception as error:  # of its code and of Triton's
        failed.append(f"Liger's {name}")
        print(f"Liger's {name}: {type(error).__name__}: {str(error).strip()[:500]}", file=sys.stderr)
        return None
    if result is None or name in liger.UNCHECKED:
        return step
    others = (bind(ORIGINALS[name], args), lambda: ops.OPS[name](*args))
    return step if agrees(f"Liger's {name}", result, others, args[0].dtype) else None


def copy_step(moved: int, like: torch.Tensor) -> Step:
    """Reads and writes as many bytes as the op has to."""
    source = torch.zeros(max(1, moved // 2 // like.element_size()), dtype=like.dtype, device=like.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def clock_for(device: torch.device, threads: int) -> Callable[[], float]:
    """Of a CPU: on one thread the time that the process computed, which other programs disturb least."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turns(candidates: dict[str, Step], clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each."""
    repeats, round_s = {}, 0.0
    for name, step in candidates.items():
        step()  # warms up
        once = seconds(step, 1, clock)
        repeats[name] = min(100, max(1, round(SECONDS_PER_TURN / max(once, 1e-6))))
        round_s += once * repeats[name]
    rounds = min(ROUNDS[-1], max(ROUNDS[0], round(SECONDS_PER_ROW / max(round_s, 1e-6))))
    turns = [{name: seconds(step, repeats[name], clock) for name, step in candidates.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in candidates}


def seconds(step: Step, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        step()
    return (clock() - start) / repeats


def row(
    name: str, dtype: str, shape: str, threads: int, device: torch.device, times: dict[str, float]
) -> dict[str, Any]:
    def ratio(to: str) -> str:
        return f"{times[to] / times['ours']:.2f}" if to in times else ""

    return {
        "op": name,
        "dtype": dtype,
        "shape": shape,
        "threads": threads,
        "capability": ops.cpu_capability() if device.type == "cpu" else "",
        "device": device_name(device),
        "torch": torch.__version__,
        "median_ms": f"{times['ours'] * 1e3:.3f}",
        "ratio_to_eager": ratio("eager"),
        "ratio_to_compile": ratio("compile"),
        "ratio_to_roofline": ratio("roofline"),
    }


def accelerator_row(row: dict[str, Any], times: dict[str, float], moved: int, bandwidth: float) -> dict[str, Any]:
    """Times mean something on an accelerator, where nobody else computes: they take the place of threads."""
    row = {key: row[key] for key in ("op", "dtype", "shape", "device", "torch")} | {
        "median_us": f"{times['ours'] * 1e6:.1f}",
        "gb_per_s": f"{moved / times['ours'] / 1e9:.0f}",
        "share_of_copy": f"{moved / times['ours'] / bandwidth:.2f}",
        **{key: row[key] for key in ("ratio_to_eager", "ratio_to_compile", "ratio_to_roofline")},
        "ratio_to_liger": f"{times['liger'] / times['ours']:.2f}" if "liger" in times else "",
    }
    return row


def device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return devices.describe(device).partition("(")[2].rstrip(")")
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
