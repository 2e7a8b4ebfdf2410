# SPDX-License-Identifier: Apache-2.0
"""What is installed here and which kernels can run: the report to paste into an issue (``vidgen env``)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from vidgen import __version__, ops
from vidgen import device as devices

PACKAGES = (
    *("torch_npu", "triton", "triton-ascend", "safetensors", "transformers", "av", "decord", "pillow", "PyYAML"),
    *("matplotlib", "megatron-core", "mindspeed"),
)
NATIVE = "cpu_cpp"  # the compiled kernels, which may be missing
ABSENT = "no such implementation"
PLAIN = ("composite", "reference")  # implementations in PyTorch's own operators, on every device


def report() -> dict[str, Any]:
    """Versions, processor, devices, problems, and for every op and backend None (it can run) or the reason why not."""
    versions = {
        "vidgen": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
    }
    software = devices.software()
    return {
        "versions": versions,
        "software": software,
        "platform": platform.platform(),
        "cpu_capability": ops.cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": devices.describe(devices.resolve("auto")),
        "devices": {kind: devices.why_not(kind) for kind in devices.KINDS},
        "communication": {kind: why_not_communication(kind) for kind in devices.KINDS},
        "native": ops.native_status,
        "problems": problems(versions, software, os.environ),
        "variables": [{**vars(variable), "value": os.environ.get(variable.name)} for variable in devices.VARIABLES],
        "ops": {name: {column: _why_not(name, *column) for column in columns()} for name in sorted(ops.OPS)},
    }


def columns() -> list[tuple[str, str]]:
    """``(kind of device, backend)`` of every implementation that some op has; those in plain PyTorch last."""
    found: dict[tuple[str, str], None] = {("cpu", NATIVE): None}
    for kind in devices.KINDS:
        for names in ops.table(kind).values():
            found |= {(kind, name): None for name in names if name not in PLAIN}
    return [*found, *(("any", name) for name in PLAIN)]


def why_not_communication(kind: str) -> str | None:
    """Why processes on such devices cannot talk to each other here, or None where they can."""
    name = devices.COMMUNICATION[kind]
    if (reason := devices.why_not(kind)) is not None:
        return f"{name}: {reason}"
    if not torch.distributed.is_available():
        return f"{name}: this PyTorch is built without torch.distributed"
    return None if torch.distributed.is_backend_available(name) else f"{name}: not in this PyTorch"


def problems(
    versions: Mapping[str, str | None], software: Mapping[str, str | None], environ: Mapping[str, str]
) -> list[str]:
    """Combinations that are known not to work, each with what to do."""
    found = []
    torch_npu, home = versions["torch_npu"], environ.get("ASCEND_HOME_PATH")
    if torch_npu is not None:
        if _release(torch_npu) != _release(versions["torch"] or ""):
            found.append(f"torch_npu {torch_npu} is built for torch {_release(torch_npu)}, not {versions['torch']}")
        if home is None:
            found.append("torch_npu is installed but ASCEND_HOME_PATH is not set: source the set_env.sh of CANN")
        if versions["triton"] is not None and versions["triton-ascend"] is None:
            found.append("torch_npu beside triton, which has no Ascend compiler: Triton kernels need triton-ascend")
    if home is not None and software["CANN"] is None:
        found.append(f"ASCEND_HOME_PATH={home} is no folder: source the set_env.sh of CANN again")
    if software["CANN"] == "unknown version":
        found.append(f"{home} has no version file: no installed CANN; stand-in libraries compute nothing")
    if versions["triton"] is not None and versions["triton-ascend"] is not None:
        found.append("triton and triton-ascend both own the module triton: keep one of them in an environment")
    driver, built = software["CUDA driver"], software["CUDA of this PyTorch"]
    if driver is not None and software["CUDA device"] is None:
        made = "built without CUDA" if built is None else f"for CUDA {built}"
        found.append(f"there is driver {driver}, but PyTorch, which is {made}, sees no device")
    return found + _contradictions(environ)


def _contradictions(environ: Mapping[str, str]) -> list[str]:
    """Variables that contradict each other or are out of range."""
    found = []
    if environ.get("ASCEND_LAUNCH_BLOCKING") == "1" and environ.get("TASK_QUEUE_ENABLE", "0") != "0":
        found.append("ASCEND_LAUNCH_BLOCKING=1 switches the queue of TASK_QUEUE_ENABLE off: every kernel is waited for")
    allocator = environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    others = [name for name in ("max_split_size_mb", "garbage_collection_threshold") if name in allocator]
    if "expandable_segments:True" in allocator and others:
        found.append(f"PYTORCH_NPU_ALLOC_CONF: expandable_segments:True cannot stand beside {others[0]}")
    for name, low, high in (("HCCL_CONNECT_TIMEOUT", 120, 7200), ("HCCL_EXEC_TIMEOUT", 68, 17340)):
        if (value := environ.get(name)) is not None and not (value.isdecimal() and low <= int(value) <= high):
            found.append(f"{name} must be seconds from {low} to {high}, got {value!r}")
    if environ.get("VIDGEN_BACKEND"):
        found.append(
            f"VIDGEN_BACKEND={environ['VIDGEN_BACKEND']} forces one backend; unset it for the best one of each op"
        )
    return found


def exports(kind: str, environ: Mapping[str, str]) -> list[str]:
    """Lines for a shell that set what is suggested for a kind of device and not set yet.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in devices.KINDS:
        raise ValueError(f"--exports: wanted one of {', '.join(devices.KINDS)}, got {kind!r}")
    wanted = [v for v in devices.VARIABLES if v.kind == kind and v.suggested is not None and v.name not in environ]
    return [f"export {v.name}={v.suggested}  # {v.why}" for v in wanted]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """The torch release that a version belongs to: 2.13.0 of 2.13.0.post1 and of 2.13.0+cpu."""
    return ".".join(version.partition("+")[0].split(".")[:3])


def _why_not(op: str, kind: str, name: str) -> str | None:
    """Why this op has no such implementation here, or None where it has one."""
    found = {b.name: b for b in ops.OPS[op].candidates(kind if kind != "any" else "cpu")}
    if name in PLAIN:
        return None if name in found else f"{ABSENT}: it has kernels or its reference"
    if name not in found:
        if name == NATIVE and ops.native_status is not None and "composite" not in found:
            return f"the compiled kernels are not loaded: {ops.native_status}"
        return f"{ABSENT}; {next(iter(found))} runs"
    if (reason := devices.why_not(kind)) is not None:
        return f"there is a kernel, but {reason}"
    return _refusal(ops.OPS[op], found[name], kind)


def _refusal(op: Any, backend: Any, kind: str) -> str | None:
    """The reason of a backend that takes none of the op's samples, such as a library that is missing."""
    reasons = []
    for dtype in (torch.bfloat16, torch.float32):
        try:
            samples = op.samples(torch.device(kind), dtype)
        except RuntimeError as error:  # a driver that does not fit: what this report is there to find
            return f"the device fails: {str(error).splitlines()[0]}"
        for args in samples:
            reasons.append(backend.refuse(*args))
            if reasons[-1] is None:
                return None
    return reasons[0] if reasons else None


def text(facts: dict[str, Any]) -> str:
    """The report in lines: facts, problems, then the table of ops, then the reasons behind each "no"."""
    width = max(map(len, [*facts["versions"], *facts["software"]])) + 1
    lines = [f"{name:{width}} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += [f"{name:{width}} {version or 'none'}" for name, version in facts["software"].items()]
    lines += [f"{name:{width}} {facts[name]}" for name in ("platform", "cpu_capability", "threads", "device")]
    for kind, reason in facts["devices"].items():
        talk = facts["communication"][kind]
        lines.append(
            f"{'device ' + kind:{width}} {reason or 'yes'}; processes talk: {talk or devices.COMMUNICATION[kind]}"
        )
    lines += [f"{'kernels':{width}} {facts['native'] or 'loaded'}", ""]
    lines += [f"PROBLEM {problem}" for problem in facts["problems"]]
    lines += ["Variables of the environment, what they do and what is suggested: vidgen env --variables", ""]
    return "\n".join(lines + _table(facts["ops"]))


def _table(rows: dict[str, dict[tuple[str, str], str | None]]) -> list[str]:
    heads = list(next(iter(rows.values()), {}))
    widths = {head: max(map(len, (*head, "no [10]"))) for head in heads}
    left = max(map(len, rows), default=0)
    lines = [" " * left + "".join(f"  {head[i]:>{widths[head]}}" for head in heads) for i in range(2)]
    reasons: list[str] = []  # each once, numbered in the table
    for name, row in rows.items():
        cells = []
        for head in heads:
            reason = row[head]
            absent = reason is not None and reason.startswith(ABSENT)
            if reason is not None and not absent and reason not in reasons:
                reasons.append(reason)
            cell = "yes" if reason is None else "-" if absent else f"no [{reasons.index(reason) + 1}]"
            cells.append(f"  {cell:>{widths[head]}}")
        lines.append(f"{name:{left}}" + "".join(cells))
    notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
    return [*lines, "", "- there is no such implementation of this op", *notes]


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """The report with names as JSON has them: a column is "kind backend"."""
    rows = {name: {" ".join(column): reason for column, reason in row.items()} for name, row in facts["ops"].items()}
    return {**facts, "ops": rows}


def variables(environ: Mapping[str, str]) -> str:
    """Every variable that drivers, allocators and compilers read, its value, the suggested one, and why."""
    lines = []
    for kind in devices.KINDS:
        lines += [f'for {kind} (to set what is suggested: eval "$(vidgen env --exports {kind})"):']
        for v in (v for v in devices.VARIABLES if v.kind == kind):
            value = environ.get(v.name)
            state = "not set" if value is None else f"= {value}"
            advice = "" if v.suggested is None or v.suggested == value else f"; suggested: {v.suggested}"
            lines.append(f"  {v.name} {state}{advice}\n      {v.meaning}" + (f"; {v.why}" if v.why else ""))
    return "\n".join(lines)
