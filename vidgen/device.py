# SPDX-License-Identifier: Apache-2.0
"""The one place that knows device names: which device to use, which dtypes it computes in, memory, waiting for it."""

from __future__ import annotations

import importlib
import resource
import sys
from typing import Any

import torch

NAMES = ("auto", "cpu", "cuda", "npu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve(name: str = "auto") -> torch.device:
    """The device called ``name``: "cpu", "cuda", "npu", one with an index ("cuda:1"), or "auto" for the best present.

    Raises:
        ValueError: an unknown name, or a device that this machine or this PyTorch does not have.
    """
    kind, _, index = name.partition(":")
    if kind not in NAMES or (index and not index.isdecimal()) or (kind == "auto" and index):
        raise ValueError(f"device: wanted one of {', '.join(NAMES)}, with an index such as cuda:1, got {name!r}")
    if kind == "auto":
        return next(torch.device(best) for best in ("cuda", "npu", "cpu") if why_not(best) is None)
    if (reason := why_not(kind)) is not None:
        raise ValueError(f"device: {name!r} cannot be used here: {reason}")
    if kind != "cpu" and int(index or 0) >= (count := _module(kind).device_count()):
        raise ValueError(f"device: {name!r} cannot be used here: there are {count}")
    return torch.device(name)


def why_not(kind: str) -> str | None:
    """Why there is no device of this kind, or None where there is one."""
    if kind == "cpu":
        return None
    if kind == "cuda":
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        return None if torch.cuda.is_available() else "no CUDA device is visible"
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        return f"torch_npu cannot be imported ({error})"
    return None if _module("npu").is_available() else "no NPU is visible"


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype that weights and activations have under ``precision`` ("fp32" or "bf16").

    There is no autocast: a model is cast as a whole, and the optimizer keeps the float32 master copy.

    Raises:
        ValueError: unknown precision, or one that the device does not compute in.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision: wanted one of {', '.join(DTYPES)}, got {precision!r}")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"precision: {torch.cuda.get_device_name(device)} does not compute in bf16; use fp32")
    return DTYPES[precision]


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device has run."""
    if device.type != "cpu":
        _module(device.type).synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: by the allocator of an accelerator, or by this process on a CPU (resident set)."""
    if device.type != "cpu":
        return int(_module(device.type).max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes everywhere but there


def describe(device: torch.device) -> str:
    """The device in words, as it stands in reports."""
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    return f"{device.type} ({_module(device.type).get_device_name(device)})"


def rng_state(device: torch.device) -> torch.Tensor | None:
    """State of the device's own random generator, None on a CPU (whose generator is torch's global one)."""
    return None if device.type == "cpu" else _module(device.type).get_rng_state(device)


def set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore what `rng_state` returned."""
    _module(device.type).set_rng_state(state, device)


def _module(kind: str) -> Any:
    return getattr(torch, kind)
