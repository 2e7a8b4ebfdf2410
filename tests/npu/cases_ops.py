# SPDX-License-Identifier: Apache-2.0
"""What test_npu_ops.py and test_schemas.py ask, in a process with torch_npu: our ops on the emulated device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from vidgen import ops

from .emulator import NpuEmulator, same_memory
from .emulator_reference import REFERENCE

CPU = torch.device("cpu")


def served() -> list[str]:
    return [name for name, backends in ops.table("npu").items() if "npu_torch" in backends]


def moved(f: Callable[[Tensor], Tensor], values: Any) -> Any:
    return tuple(f(v) if isinstance(v, Tensor) else v for v in values)


def tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, tuple | list) else (values,)
    return [v for v in values if isinstance(v, Tensor)]


def forward_and_gradients(op: Any, args: Sequence[Any], reference: bool = False) -> tuple[list[Tensor], list[Any]]:
    """Results and the gradients of all arguments that have one, for gradients of the results drawn on the CPU."""
    args = moved(lambda t: t.detach().requires_grad_() if t.is_floating_point() and op.differentiable else t, args)
    out = tensors(op.reference(*args) if reference else op(*args))
    if not op.differentiable:
        return out, []
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in out]
    pairs = [(y, s) for y, s in zip(out, seeds, strict=True) if y.requires_grad]
    leaves = [t for t in tensors(args) if t.requires_grad]
    grads = torch.autograd.grad([y for y, _ in pairs], leaves, [s for _, s in pairs], allow_unused=True)
    return [y.detach() for y in out], list(grads)


def device(t: Tensor) -> Tensor:
    """A copy on the device, with the strides that ``t`` has."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.npu().as_strided(t.shape, t.stride(), t.storage_offset())


def host(t: Tensor | None) -> Tensor | None:
    return None if t is None else same_memory(t).clone()


@contextlib.contextmanager
def npu_torch_alone() -> Iterator[None]:
    """The other backends would serve some of these arguments before it, or what it refuses."""
    ops.table("npu")  # so that all of them have joined
    before = {name: op.backends["npu"] for name, op in ops.OPS.items() if "npu" in op.backends}
    for name, backends in before.items():
        ops.OPS[name].backends["npu"] = [b for b in backends if b.name == "npu_torch"]
    try:
        yield
    finally:
        for name, backends in before.items():
            ops.OPS[name].backends["npu"] = backends


def samples_equal(name: str, dtype: str = "float32") -> dict[str, Any]:
    """Every sample of an op that npu_torch takes: results and gradients, on the emulated device and by the reference.

    Returns which operators of torch_npu ran, and what was refused and why.
    """
    op, kind = ops.OPS[name], getattr(torch, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[kind]
    torch.manual_seed(0)
    calls, refused = set(), []
    backend = next(b for b in op.candidates("npu") if b.name == "npu_torch")
    for i, args in enumerate(op.samples(CPU, kind)):
        there = moved(device, args)
        if (reason := backend.refuse(*there)) is not None:
            refused.append(reason)
            continue
        wanted, wanted_grads = forward_and_gradients(op, args, reference=True)
        with NpuEmulator(REFERENCE) as emulator, npu_torch_alone():
            with torch.no_grad():
                plain = tensors(op(*there))
            got, grads = forward_and_gradients(op, there)
        assert all(y.device.type == "npu" for y in got)
        calls |= {call for call in emulator.calls if call.startswith("npu::")}
        for y, w in zip([*plain, *got, *grads], [*wanted, *wanted, *wanted_grads], strict=True):
            said = lambda m, i=i: f"{name}, sample {i}: {m}"  # noqa: E731
            torch.testing.assert_close(host(y), w, atol=tolerance, rtol=tolerance, msg=said)
        if op.composite is None:  # the compiler relies on what the fake says
            assert [y.stride() for y in got] == [y.stride() for y in tensors(op.fake(*args))], f"{name}, sample {i}"
    return {"calls": sorted(calls), "refused": refused, "samples": i + 1}


def calls_of_all_samples() -> dict[str, Any]:
    """Runs every sample of every op, forward and backward, in bfloat16, and returns how often each operator npu:: ran.

    The dispatcher binds each call to torch_npu's schema: a name, keyword, type or number of arguments that it does not
    have raises. Beyond that, results must have the shapes and dtypes that torch_npu's own meta kernel gives them;
    ``unknown`` are the operators that have none.
    """
    seen: Counter[str] = Counter()
    unknown: set[str] = set()

    def compared(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            results = REFERENCE[name](*args, **kwargs)
            overload = getattr(torch.ops.npu, name.removeprefix("npu::")).default
            try:
                with _disable_current_modes():
                    expected = overload(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
            except NotImplementedError:
                unknown.add(name)
                return results
            assert forms(results) == forms(expected), f"{name}: {forms(results)} but there {forms(expected)}"
            return results

        return run

    formulas = {name: compared(name) for name in REFERENCE}
    for name in served():
        op = ops.OPS[name]
        backend = next(b for b in op.candidates("npu") if b.name == "npu_torch")
        for args in op.samples(CPU, torch.bfloat16):
            there = moved(device, args)
            if backend.refuse(*there) is None:
                with NpuEmulator(formulas), npu_torch_alone():
                    with torch.no_grad():
                        op(*there)
                    forward_and_gradients(op, there)
    names = {call.removeprefix("npu::") for call in seen}
    return {"calls": names, "unknown": unknown}


def to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def forms(results: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of the results that hold anything: those for dropout and the like are empty."""
    return [(tuple(t.shape), t.dtype) for t in tensors(results) if t.numel()]


def registered(names: Sequence[str]) -> list[str]:
    return [name for name in names if hasattr(torch.ops.npu, name)]
