# SPDX-License-Identifier: Apache-2.0
"""Lowers every Triton kernel that the ops launch to Ascend's linalg dialect, with no CANN and no device.

    PYTHONPATH=.venv/triton_ascend:. python tests/triton/lower.py [--op NAME] [--save FOLDER]

needs triton-ascend in place of triton. Nothing is specified by hand: the backends run on meta tensors (sizes, strides
and dtypes, no memory) for each sample and workload of their ops, as on an Ascend device up to the point where Triton
compiles. What is compiled there is lowered here, with the same arguments, constants, divisibilities and grids.

So a backend's ``run`` must work on meta tensors: it may look at shapes, strides and dtypes, and not at values or
addresses. Triton-ascend itself refuses grids of more than 65535 programs, which these launches therefore also test.

Prints a JSON document: each lowered kernel with what the lint found, what failed, and which kernels no op launched. A
lowering that passes proves that the front end and the dialect's passes accept the kernel. It does not prove that it
fits the unified buffer, that the vendor's compiler accepts it, or any number.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["VIDGEN_NATIVE"] = "0"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("npu", "Ascend910B3", 0)
UNIFIED_BUFFER = 192 * 1024  # bytes, of one vector core of this target
META = torch.device("meta")
BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}

lowered: list[dict[str, Any]] = []
failed: list[dict[str, str]] = []
launching = ""  # which op and arguments are being run


class Device:
    """What a launch asks the driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def lower(source: Any, options: dict[str, Any]) -> str:
    """The linalg text of one kernel with one set of argument types and constants."""
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler

    backend = compiler.AscendBackend(TARGET)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(parsed, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"hash": "lowered", **parsed.__dict__}
    return str(compiler.ttir_to_linalg(compiler.make_ttir(module, metadata, parsed), metadata, parsed, named_ops=True))


def compile_instead(source: Any, target: Any = None, options: dict[str, Any] | None = None) -> Any:
    """Takes the place of triton's ``compile``: lowers, and returns a kernel that does nothing when launched."""
    entry = {"kernel": source.fn.__name__, "launched_by": launching}
    try:
        text = lower(source, options or {})
    except subprocess.CalledProcessError as error:
        failed.append({**entry, "error": "triton-adapter-opt: " + error.stderr.decode(errors="replace")[:1500]})
    except Exception as error:  # the front end's errors have no common class
        failed.append({**entry, "error": f"{type(error).__name__}: {str(error)[:1500]}"})
    else:
        constants = {name: str(value) for name, value in source.constants.items()}
        signature = dict(source.signature)
        lowered.append({**entry, "signature": signature, "constants": constants, "lint": lint(text), "text": text})

    def ignore(*args: Any) -> None:
        return None

    return SimpleNamespace(
        launch_metadata=ignore, run=ignore, _init_handles=ignore, function=None, packed_metadata=None
    )


def lint(text: str) -> list[str]:
    """What is wrong with a lowered kernel, in words.

    An access that the compiler cannot see as a strided block becomes a loop over single elements.
    """
    found = []
    if scalar := [line for line in inside_loops(text) if re.search(r"memref\.(load|store)", line)]:
        found.append(f"{len(scalar)} accesses to single elements in a loop, such as {scalar[0]}")
    elif "ExtractedLoadOrStore" in text:
        found.append("a loop over single elements in place of a block")
    if "inline_asm" in text:
        found.append("inline assembly")
    for sizes, dtype in re.findall(r"memref\.alloc\(\) : memref<((?:\d+x)+)(\w+)>", text):
        size = math.prod(int(n) for n in sizes.split("x")[:-1]) * BYTES[dtype]
        if size > UNIFIED_BUFFER:
            found.append(f"one buffer of {size} bytes; the unified buffer has {UNIFIED_BUFFER}")
    return found


def inside_loops(text: str) -> Iterator[str]:
    """Lines within scf.for or scf.while, by their braces."""
    depths: list[int] = []  # brace depths at which the open loops started
    depth = 0
    for line in text.splitlines():
        if depths:
            yield line.strip()
        if re.search(r"\bscf\.(for|while)\b", line):
            depths.append(depth)
        depth += line.count("{") - line.count("}")
        while depths and depth <= depths[-1] and "}" in line:
            depths.pop()


def pretend_device() -> None:
    """From here on launches compile for Ascend, which means: are lowered; meta tensors count as tensors there."""
    driver.set_active(Device())
    importlib.import_module("triton.compiler").compile = compile_instead
    torch.meta = SimpleNamespace(device=lambda device: contextlib.nullcontext())
    tuning = importlib.import_module("vidgen.ops._backends.triton._tuning").TUNING
    tuning["meta"] = tuning["npu"]


def launch_all(only: str | None) -> None:
    """Run the Triton backend of every op on everything it takes."""
    global launching
    from vidgen import ops

    importlib.import_module("vidgen.ops._backends.triton").register("npu")
    for name, op in ops.OPS.items():
        backends = [b for b in op.backends.get("npu", ()) if b.name == "triton" and only in (None, name)]
        for backend in backends:
            for case, args in cases(op):
                if backend.refuse(*args) is None:
                    launching = f"{name} {case}"
                    try:
                        run(op, backend, args)
                    except RuntimeError as error:  # grids that are too large among others
                        failed.append({"kernel": "", "launched_by": launching, "error": str(error)})


def cases(op: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Samples for the branches, workloads for the sizes."""
    for dtype in (torch.bfloat16, torch.float32):
        for i, args in enumerate(op.samples(META, dtype)):
            yield f"{short(dtype)} sample {i}", args
    for shape, make in op.workloads(META, torch.float16).items():
        yield f"float16 {shape}", make()
    for shape, make in full_size(op.name).items():
        yield f"bfloat16 {shape}", make()


def full_size(name: str) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """The sizes of whole models, as they are measured on accelerators."""
    if name.startswith("skiparse_attention") and not name.endswith("backward"):
        benchmark, sizes = (importlib.import_module(module) for module in ("attention", "workloads"))
        every = benchmark.cases(sizes.SIZES, quick=False)
        return {
            case.name: lambda case=case: benchmark.arguments(case, sizes.SIZES, META, torch.bfloat16) for case in every
        }
    return importlib.import_module("workloads").workloads(META, torch.bfloat16).get(name, {})


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(op: Any, backend: Any, args: tuple[Any, ...]) -> None:
    """The gradient of a composite op has no op of its own: it is reached through autograd."""
    if op.composite is None:
        with torch.no_grad():
            backend.run(*args)
        return
    args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    results = backend.run(*args)
    results = [r for r in (results if isinstance(results, (tuple, list)) else [results]) if r.requires_grad]
    if results:
        torch.autograd.backward(results, [torch.empty_like(r) for r in results])


def backend_modules() -> list[ModuleType]:
    package = importlib.import_module("vidgen.ops._backends.triton")
    return [importlib.import_module(m.name) for m in pkgutil.iter_modules(package.__path__, package.__name__ + ".")]


def never_launched(*modules: ModuleType) -> list[str]:
    """Kernels of the modules that nothing launched and no launched kernel calls."""
    kernels = {k: v for module in modules for k, v in vars(module).items() if isinstance(v, JITFunction)}
    reached = {entry["kernel"] for entry in (*lowered, *failed)}
    while more := {k for r in reached if r in kernels for k in called_by(kernels[r]) if k in kernels} - reached:
        reached |= more
    return sorted(set(kernels) - reached)


def called_by(kernel: Any) -> list[str]:
    return re.findall(r"\b([A-Za-z_]\w*)\(", kernel.src)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="only this op; what is never launched is then not looked for")
    parser.add_argument("--save", type=Path, help="write the lowered texts here")
    arguments = parser.parse_args()
    pretend_device()
    with contextlib.redirect_stdout(sys.stderr):  # triton-ascend prints its warnings there
        launch_all(arguments.op)
    for i, entry in enumerate(lowered):
        text = entry.pop("text")
        if arguments.save:
            arguments.save.mkdir(parents=True, exist_ok=True)
            (arguments.save / f"{entry['kernel']}.{i}.mlir").write_text(text)
    report = {
        "triton": triton.__version__,
        "lowered": lowered,
        "failed": failed,
        "never_launched": [] if arguments.op else never_launched(*backend_modules()),
    }
    json.dump(report, sys.stdout, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
