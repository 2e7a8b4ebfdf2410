# SPDX-License-Identifier: Apache-2.0
"""Code written for device "npu", run numerically where there is no Ascend device.

Needs the stand-ins of cann_stubs.py: they give the device host memory, so allocation and copies work while every kernel
launch fails. Under ``with NpuEmulator(REFERENCE):`` an operator that touches an npu tensor is carried out by the CPU on
that same memory. The operators npu:: have no CPU kernel; the formulas in emulator_reference.py stand for them, and
one that is not there raises. Messages of torch.distributed go over gloo. Operators of other libraries run as they are,
and what they call comes here again.

Real in this arrangement: schemas, the Python interface, the autograd wiring inside torch_npu, autocast, devices,
streams, events, which backend vidgen chooses. Not real: the vendor's numerics and limits, speed, collectives.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .emulator_internals import internals, replace_what_modes_do_not_see

# They only describe or allocate memory, which the stand-ins can do. Some operators that PyTorch counts as views copy.
COPYING = ("aten::contiguous", "aten::reshape")
NATIVE = ("aten::empty", "aten::detach", "aten::alias", "aten::set_", "aten::resize_", "aten::record_stream")


class NpuEmulator(TorchDispatchMode):
    """``calls`` counts by operator what was carried out."""

    def __init__(self, reference: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.reference = {**internals(reference), **reference}
        self.calls: Counter[str] = Counter()
        replace_what_modes_do_not_see()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors: list[torch.Tensor] = []
        mapped(lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else None, [args, kwargs])
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not any(t.device.type == "npu" for t in tensors) and (target is None or target.type != "npu"):
            return func(*args, **kwargs)
        if composite(func):
            with self:  # inside the kernel of an op of ours the dispatcher no longer takes such operators apart
                return func.decompose(*args, **kwargs)
        if name.startswith(NATIVE) or (func.is_view and not (name in COPYING and copies(func, *args, **kwargs))):
            return func(*args, **kwargs)
        self.calls[name] += 1
        if func.namespace not in ("aten", "npu", "c10d"):
            with self:  # a call by the dispatcher would come here again: name the kernel
                return func._op_dk(torch._C.DispatchKey.PrivateUse1, *args, **kwargs)
        if func.namespace == "npu" and name not in self.reference:
            raise NotImplementedError(f"{name}: emulator_reference.py has no formula for it")
        run = self.reference.get(name, func)
        given: dict[int, torch.Tensor] = {id(t): t for t in tensors}

        def lower(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "npu":
                low = same_memory(leaf)
                given[id(low)] = leaf
                alive.append(low)  # so that no other tensor gets its id
                return low
            if isinstance(leaf, torch.device) and leaf.type == "npu":
                return torch.device("cpu")
            return leaf

        def lift(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) in given:  # an operator that writes in place
                return given[id(leaf)]
            return leaf if target is not None and target.type == "cpu" else to_npu(leaf)

        alive: list[torch.Tensor] = []
        low_args, low_kwargs = mapped(lower, args), mapped(lower, kwargs)
        if target is not None:
            low_kwargs["device"] = torch.device("cpu")
        if low_kwargs.get("pin_memory"):
            low_kwargs["pin_memory"] = False
        return mapped(lift, run(*low_args, **low_kwargs))


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of every leaf; what operators take and return has no other containers, and PyTorch's own is slow."""
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [mapped(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return function(value)


@functools.cache
def composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def copies(func: Any, t: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    low = same_memory(t)
    return func(low, *args, **kwargs).data_ptr() != low.data_ptr()


def same_memory(t: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of an npu tensor, with its strides. It does not keep that memory alive."""
    size = t.untyped_storage().nbytes()
    if t.numel() == 0 or size == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = (ctypes.c_char * size).from_address(t.untyped_storage().data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8)[: size // t.itemsize * t.itemsize].view(t.dtype)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def to_npu(t: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(t, device="npu")
    same_memory(result).copy_(t)
    return result
