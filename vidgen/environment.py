# SPDX-License-Identifier: Apache-2.0
"""What is installed here and which kernels can run: the report to paste into an issue (``vidgen env``)."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from vidgen import __version__, ops
from vidgen import device as devices

PACKAGES = ("torch_npu", "triton", "safetensors", "transformers", "av", "decord", "pillow", "PyYAML", "matplotlib")
BACKENDS = {"cpu_cpp": "cpu", "cuda": "cuda", "npu": "npu"}  # column of the table: the device it is for
PLAIN = ("composite", "reference")  # implementations in PyTorch's own operators, on every device


def report() -> dict[str, Any]:
    """Versions, processor, devices, and for every op and backend None (it can run) or the reason why not."""
    return {
        "versions": {
            "vidgen": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu_capability": ops.cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": devices.describe(devices.resolve("auto")),
        "devices": {kind: devices.why_not(kind) for kind in ("cpu", "cuda", "npu")},
        "native": ops.native_status,
        "ops": {name: {column: _why_not(name, column) for column in (*BACKENDS, *PLAIN)} for name in sorted(ops.OPS)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not(op: str, column: str) -> str | None:
    """Why this op has no such implementation here, or None where it has one."""
    kind = BACKENDS.get(column, "cpu")
    names = [b.name for b in ops.OPS[op].candidates(kind)]
    if column in PLAIN:
        return None if column in names else "not a composite: it has kernels or its reference"
    if any(name not in PLAIN for name in names):
        return devices.why_not(kind)
    if kind == "cpu" and ops.native_status is not None and "composite" not in names:
        return f"the compiled kernels are not loaded: {ops.native_status}"
    return f"no kernel for it; {names[0]} runs"


def text(facts: dict[str, Any]) -> str:
    """The report in lines: facts, then the table of ops, then the reasons behind each "no"."""
    lines = [f"{name:14} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += [f"{name:14} {facts[name]}" for name in ("platform", "cpu_capability", "threads", "device")]
    lines += [f"{'device ' + kind:14} {reason or 'yes'}" for kind, reason in facts["devices"].items()]
    lines += [f"{'kernels':14} {facts['native'] or 'loaded'}", ""]
    columns = (*BACKENDS, *PLAIN)
    width = max(map(len, facts["ops"]), default=0)
    reasons: list[str] = []  # each once, numbered in the table
    lines.append(" " * width + "".join(f"  {column:>9}" for column in columns))
    for name, row in facts["ops"].items():
        cells = []
        for column in columns:
            if (reason := row[column]) is not None and reason not in reasons:
                reasons.append(reason)
            cells.append(f"  {'yes' if reason is None else f'no [{reasons.index(reason) + 1}]':>9}")
        lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join([*lines, "", *(f"[{number}] {reason}" for number, reason in enumerate(reasons, 1))])
