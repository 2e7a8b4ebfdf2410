# SPDX-License-Identifier: Apache-2.0
"""The cases of the report, and the process that runs them: a kernel that goes wrong may take its process with it.

A case is a name such as ``values/haar_3d/triton/bfloat16/4``. The process reads names from standard input, one a line,
and writes a line "begin NAME" and a line "end {...}" for each. ``--list`` writes what is
installed, a line "CASES", and all names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from accuracy import Verdict, judge_gradients, judge_values, tensors  # noqa: E402
from torch.utils._python_dispatch import _get_current_dispatch_mode  # noqa: E402

from vidgen import device as devices  # noqa: E402
from vidgen import environment, ops  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
GRADIENT_DTYPES = ("float32", "bfloat16")
PLAIN = ("composite", "reference")
# Their results are float32, but come from the vendor in the dtype of the inputs.
ROUNDED = {("attention_backward", "npu_torch")}


class Refused(Exception):
    """The backend says that it does not take these arguments."""


def names(device: torch.device) -> Iterator[str]:
    """Every case of a device, the ones that tell most first."""
    from small_models import MODEL_CASES

    usable = [name for name in DTYPES if devices.why_not_dtype(device, getattr(torch, name)) is None]
    for name, op in sorted(ops.OPS.items()):
        count = range(len(op.samples(torch.device("cpu"), torch.float32)))
        for dtype in usable:
            yield from (f"dispatch/{name}/{dtype}/{i}" for i in count)
        for backend in [b.name for b in op.candidates(device.type)]:
            for dtype in usable:
                yield from (f"values/{name}/{backend}/{dtype}/{i}" for i in count)
            if op.differentiable:
                for dtype in (dtype for dtype in GRADIENT_DTYPES if dtype in usable):
                    yield from (f"gradients/{name}/{backend}/{dtype}/{i}" for i in count)
    for dtype in (dtype for dtype in GRADIENT_DTYPES if dtype in usable):
        yield from (f"models/{case}/{dtype}" for case in MODEL_CASES)
    for name, op in sorted(ops.OPS.items()):
        for dtype in (dtype for dtype in ("bfloat16", "float32") if dtype in usable):
            for shape in op.workloads(device, getattr(torch, dtype)):
                yield f"bench/{name}/{dtype}/{shape}"


def run_case(name: str, device: torch.device) -> dict[str, Any]:
    """What the report says about a case: ``verdict``, and why it is not "passed"."""
    kind, *rest = name.split("/")
    began = time.monotonic()
    try:
        facts = RUNNERS[kind](device, *rest)
    except Refused as refusal:
        facts = {"verdict": "refused", "why": str(refusal)}
    except Exception as error:  # whatever a library raises is a result, and the next case may work
        lines = traceback.format_exc().splitlines()
        facts = {"verdict": "error", "why": f"{type(error).__name__}: {error}"[:2000], "trace": lines[-12:]}
    return {"case": name, **facts, "seconds": round(time.monotonic() - began, 3)}


def judged(verdict: Verdict, problems: list[str]) -> dict[str, Any]:
    problems = [problem for problem in (verdict.why, *problems) if problem]
    facts = {"verdict": "failed" if problems else "passed", "error": verdict.error, "bound": verdict.bound}
    return {**facts, "why": "; ".join(problems)} if problems else facts


def arguments(name: str, dtype: str, number: str, device: torch.device) -> tuple[Any, ...]:
    torch.manual_seed(int(number))
    return tuple(ops.OPS[name].samples(device, getattr(torch, dtype))[int(number)])


def implementation(name: str, backend: str, args: tuple[Any, ...], device: torch.device) -> Callable[..., Any]:
    """The backend's own function. Ops that it calls in turn are the dispatcher's choice, as for users."""
    found = {b.name: b for b in ops.OPS[name].candidates(device.type)}
    if backend not in found:
        raise Refused(f"there is no backend {backend} on {device.type}; there are {', '.join(found)}")
    if (reason := found[backend].refuse(*args)) is not None:
        raise Refused(reason)
    return found[backend].run


def dispatch(device: torch.device, name: str, dtype: str, number: str) -> dict[str, Any]:
    """The op as users call it, and which backend the dispatcher takes for these arguments."""
    op, args = ops.OPS[name], arguments(name, dtype, number, device)
    taken = next(line.partition(":")[0] for line in op.explain(*args).splitlines() if line.endswith(": runs"))
    return {**judged(judge_values(op, args, op(*args), rounded_to(name, taken, args)), []), "backend": taken}


def values(device: torch.device, name: str, backend: str, dtype: str, number: str) -> dict[str, Any]:
    """The result against the truth; the arguments stay as they are, and the same comes out of memory full of NaN."""
    op, args = ops.OPS[name], arguments(name, dtype, number, device)
    run = implementation(name, backend, args, device)
    before = [a.clone() for a in tensors(args)]
    with torch.no_grad():
        results = run(*args)
        with poisoned_memory():
            again = run(*args)
    devices.synchronize(device)
    problems = []
    if not all(same(a, b) for a, b in zip(before, tensors(args), strict=True)):
        problems.append("the arguments have changed")
    if not all(same(a, b) for a, b in zip(tensors(results), tensors(again), strict=True)) and backend not in PLAIN:
        problems.append("a second call, whose memory was NaN before, gives something else")
    return judged(judge_values(op, args, results, rounded_to(name, backend, args)), problems)


def rounded_to(name: str, backend: str, args: tuple[Any, ...]) -> torch.dtype | None:
    return tensors(args)[0].dtype if (name, backend) in ROUNDED else None


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for the kind of a NaN."""
    a, b = a.detach().cpu(), b.detach().cpu()
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that Python code allocates is full of NaN: what a kernel leaves unwritten shows."""
    if _get_current_dispatch_mode() is not None:  # the emulated device allocates with the same functions
        yield
        return
    plain = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **options: Any) -> torch.Tensor:
            t = make(*args, **options)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return allocate

    for name, make in plain.items():
        setattr(torch, name, filled(make))
    try:
        yield
    finally:
        for name, make in plain.items():
            setattr(torch, name, make)


def gradients(device: torch.device, name: str, backend: str, dtype: str, number: str) -> dict[str, Any]:
    """Autograd through the op. The gradient of most is an op of its own, which must have the same backend."""
    op, args = ops.OPS[name], arguments(name, dtype, number, device)
    run = implementation(name, backend, args, device)
    if op.composite is not None or backend == "reference":  # written in what autograd knows
        return judged(judge_gradients(op, args, run), [])
    try:
        with ops.use_backend(backend):
            return judged(judge_gradients(op, args, lambda *args: op(*args)), [])
    except ValueError as error:
        if "no backend" in str(error) or "was asked for but" in str(error):
            raise Refused(str(error)) from error
        raise


def models(device: torch.device, system: str, part: str, dtype: str) -> dict[str, Any]:
    from small_models import judge_model

    verdict, problems = judge_model(system, part, getattr(torch, dtype), device)
    return judged(verdict, problems)


def bench(device: torch.device, name: str, dtype: str, shape: str) -> dict[str, Any]:
    """Median milliseconds of each backend, of eager PyTorch on the device, and of a copy of as many bytes."""
    from measure import clock_for, copy_step, in_turns
    from originals import ORIGINALS, bind

    op = ops.OPS[name]
    torch.manual_seed(0)
    args = op.workloads(device, getattr(torch, dtype))[shape]()
    candidates: dict[str, Any] = {}
    refusals: dict[str, str] = {}
    for backend in op.candidates(device.type):
        if (reason := backend.refuse(*args)) is not None:
            refusals[backend.name] = reason
        elif backend.name != "reference":
            candidates[backend.name] = forced(backend.name, op, args)
    if name in ORIGINALS:
        candidates["eager"] = bind(ORIGINALS[name], args)
    candidates["copy"] = copy_step(op.cost(*args).bytes, args[0])
    with torch.no_grad():
        times = in_turns(candidates, clock_for(device, 1))
    ms = {candidate: round(seconds * 1e3, 4) for candidate, seconds in times.items()}
    return {"verdict": "passed", "ms": ms, "refused": refusals, "bytes": op.cost(*args).bytes}


def forced(backend: str, op: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
    def step() -> Any:
        with ops.use_backend(backend):
            return op(*args)

    return step


RUNNERS: dict[str, Callable[..., dict[str, Any]]] = {
    "dispatch": dispatch,
    "values": values,
    "gradients": gradients,
    "models": models,
    "bench": bench,
}


def exact_float32(device: torch.device) -> None:
    """Matrix units round float32 to fewer bits unless told not to; the bounds are those of float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device.type == "npu":
        torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = False


@contextlib.contextmanager
def emulated(wanted: bool) -> Iterator[None]:
    """The device npu in host memory, where torch_npu has stand-ins for CANN; tests the report, not a device."""
    if not wanted:
        yield
        return
    from tests.npu.emulator import NpuEmulator
    from tests.npu.emulator_reference import REFERENCE

    with NpuEmulator(REFERENCE):
        yield


def facts(device: torch.device) -> dict[str, Any]:
    report = environment.as_json(environment.report())
    peak = devices.peak_flops(device)
    return {**report, "measured on": devices.describe(device), "peak bf16 FLOP/s": peak and peak[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs cases; run.py starts it.")
    parser.add_argument("--device", required=True)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    device = devices.resolve(options.device)
    exact_float32(device)
    with emulated(options.emulate):
        if options.list:
            print(json.dumps(facts(device)), "CASES", *names(device), sep="\n")
        else:
            for line in sys.stdin:
                print("begin", line.strip(), flush=True)
                print("end", json.dumps(run_case(line.strip(), device)), flush=True)


if __name__ == "__main__":
    main()
