# SPDX-License-Identifier: Apache-2.0
"""Where an op's meaning meets its implementations.

An op has one meaning: a schema, a check, a reference in plain PyTorch, a fake and a backward.
C++ registers under the dispatch key CPU (``csrc/cpu``); other implementations join with
:meth:`Op.add_backend`, those of an accelerator when it is first used (``_backends``). The reference
stands under CompositeExplicitAutograd and so serves every device that has nothing better;
``VIDGEN_STRICT=1`` makes that an error.

Two kinds of op exist. Most are opaque to autograd and to the compiler and so bring a fake and a
backward. A *composite* op only arranges PyTorch operators that already have both, and decomposes
into them; beside that arrangement it still has a reference written as the plain formula. Its backends
are such arrangements too: differentiable as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OPS: dict[str, Op] = {}

_library = torch.library.Library("vidgen", "DEF")
# A plain global: torch.compile can guard on it, which it cannot on a ContextVar.
_forced: str | None = os.environ.get("VIDGEN_BACKEND") or None
_strict: bool = os.environ.get("VIDGEN_STRICT", "0") not in ("", "0")
_explained: str | None = None  # name of the op whose next call only says which arguments it got

_loaded: set[str] = {"cpu", "meta"}  # device types whose backends have been looked for

Choose = Callable[[Sequence[Any]], Any]
KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1", "meta": "Meta"}
PLAIN = ("composite", "reference")  # implementations in PyTorch's own operators, on every device


def refuse_dtype(*args: Any) -> str | None:
    """What the compiled kernels say to arguments of other dtypes than their own; see ``native_dtype`` in csrc."""
    dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"the kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Backend:
    """One implementation of an op on one device.

    ``refuse(*args)`` says why it cannot take these arguments, or None when it can.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *args: None


@dataclass(frozen=True)
class Cost:
    """Least memory traffic and arithmetic that an op's arguments imply: what a roofline divides by."""

    bytes: int
    flops: int = 0


@dataclass
class Op:
    """One operator: ``op(*args)`` checks the arguments and lets the dispatcher choose the kernel.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor`` in PyTorch's schema language.
        check: raises ValueError for arguments that no backend may take.
        reference: the formula in plain PyTorch; truth in float64, fallback on every device.
        samples: ``(device, dtype) -> [args]``; small edge cases, for tests.
        workloads: ``(device, dtype) -> {name: () -> args}``; real shapes of models, for benchmarks.
        random_args: ``(choose, device, dtype) -> args`` for property tests; ``choose(options)``
            picks one of a sequence.
        cost: ``(*args) -> Cost``, for benchmarks.
        fake: shapes and strides of the result without computing it.
        out_shape: ``(*args) -> shape`` of the one result; gives the op a form that writes into a
            tensor of the caller's, see :meth:`into`.
        save, backward: as ``torch.library.register_autograd`` wants them; None for an op that
            is not differentiable (such as the backward of another one).
        native_refuses: as ``Backend.refuse``, for the kernel in C++: which arguments that kernel itself hands on to the
            reference.
        composite: the op written with PyTorch operators that are fast and differentiable as they
            are; takes the place of fake, save and backward.
    """

    schema: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Sequence[tuple[Any, ...]]]
    workloads: Callable[[torch.device, torch.dtype], Mapping[str, Callable[[], tuple[Any, ...]]]]
    random_args: Callable[[Choose, torch.device, torch.dtype], tuple[Any, ...]]
    cost: Callable[..., Cost]
    fake: Callable[..., Any] | None = None
    save: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    composite: Callable[..., Any] | None = None
    out_shape: Callable[..., tuple[int, ...]] | None = None
    native_refuses: Callable[..., str | None] = refuse_dtype
    name: str = field(init=False)
    backends: dict[str, list[Backend]] = field(init=False, default_factory=dict)
    overload: Any = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.schema.split("(")[0]
        _library.define(self.schema)
        if self.composite is not None:
            _library.impl(self.name, self._route, "CompositeImplicitAutograd")
        else:
            if self.fake is None:
                raise ValueError(f"{self.name}: an op that is not composite needs a fake")
            _library.impl(self.name, self._fall_back, "CompositeExplicitAutograd")
            # Native kernels call this one for what they do not take themselves, float64 above all.
            _library.define(self.schema.replace("(", "_reference(", 1))
            _library.impl(f"{self.name}_reference", self._fall_back, "CompositeExplicitAutograd")
            for device in ("cuda", "npu"):
                _library.impl(self.name, self._route, KEYS[device])
            torch.library.register_fake(f"vidgen::{self.name}", self.fake, lib=_library)
            if self.backward is not None:
                torch.library.register_autograd(
                    f"vidgen::{self.name}", self.backward, setup_context=self.save, lib=_library
                )
        self.overload = getattr(torch.ops.vidgen, self.name).default
        if self.out_shape is not None:
            head, _ = self.schema.rsplit(")", 1)
            _library.define(head.replace("(", ".out(", 1) + ", *, Tensor(a!) out) -> ()")
            _library.impl(f"{self.name}.out", self._into, "CompositeExplicitAutograd")
            torch.library.register_fake(f"vidgen::{self.name}.out", lambda *args, out: None, lib=_library)
        OPS[self.name] = self

    @property
    def differentiable(self) -> bool:
        return self.composite is not None or self.backward is not None

    def __call__(self, *args: Any) -> Any:
        if _explained == self.name:
            raise _Reached(args)
        self.check(*args)
        if _forced is not None and (forced := self._named(_forced, args)).name in PLAIN:
            return forced.run(*args)
        return self.overload(*args)

    def into(self, out: torch.Tensor, *args: Any) -> torch.Tensor:
        """Write the result into ``out``: contiguous, of the result's shape, dtype and device; no autograd."""
        self.check(*args)
        if self.out_shape is None:
            raise ValueError(f"{self.name}: this op has no out= form")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, out)):
            raise ValueError(f"{self.name}: out= does not support autograd, but one of the arguments requires grad")
        shape, like = tuple(self.out_shape(*args)), tensors[0]
        if tuple(out.shape) != shape or out.dtype != like.dtype or out.device != like.device:
            wanted = f"{shape} of {like.dtype} on {like.device}"
            raise ValueError(
                f"{self.name}: out must be {wanted}, got {tuple(out.shape)} of {out.dtype} on {out.device}"
            )
        if not out.is_contiguous():
            raise ValueError(f"{self.name}: out must be contiguous, got strides {out.stride()}")
        if _forced is not None:
            out.copy_(self._named(_forced, args).run(*args))
        else:
            getattr(torch.ops.vidgen, self.name).out(*args, out=out)
        return out

    def _into(self, *args: Any, out: torch.Tensor) -> None:
        out.copy_(self._route(*args))

    def _route(self, *args: Any) -> Any:
        """What stands under the dispatch keys that several implementations share."""
        backend = self._first(_device(args), args) if _forced is None else self._named(_forced, args)
        return self._fall_back(*args) if backend.name == "reference" else backend.run(*args)

    def _fall_back(self, *args: Any) -> Any:
        """The reference where nobody asked for it: the dispatcher or a kernel found nothing better."""
        if _strict:
            raise RuntimeError(f"{self.name}: VIDGEN_STRICT is set and only the reference is left: {self._why(args)}")
        return self.reference(*args)

    def _why(self, args: tuple[Any, ...]) -> str:
        from ._native import status

        device = _device(args)
        refused = [f"{b.name} refused ({reason})" for b in self.candidates(device) if (reason := b.refuse(*args))]
        missing = f"; compiled kernels: {status}" if device == "cpu" and status else ""
        return ("; ".join(refused) or f"there is no other implementation on {device}") + missing

    def add_backend(self, device: str, backend: Backend) -> None:
        """Let ``backend`` serve ``device``, ahead of the reference and behind those added before."""
        chain = self.backends.setdefault(device, [])
        chain.append(backend)
        if device == "cpu" and len(chain) == 1 and self.composite is None:
            _library.impl(self.name, self._route, KEYS[device])

    def candidates(self, device: str) -> list[Backend]:
        """All implementations for ``device``, best first; the reference is always last."""
        _load(device)
        found = list(self.backends.get(device, []))
        native = device == "cpu" and self.composite is None and not found
        if native and torch._C._dispatch_has_kernel_for_dispatch_key(f"vidgen::{self.name}", KEYS[device]):
            found.append(Backend("cpu_cpp", self.overload, self.native_refuses))
        if self.composite is not None:
            found.append(Backend("composite", self.composite))
        return [*found, Backend("reference", self.reference)]

    def explain(self, *args: Any) -> str:
        """Which implementation these arguments get, and why not the others."""
        self.check(*args)
        lines, chosen = [], False
        for backend in self.candidates(_device(args)):
            reason = backend.refuse(*args)
            verdict = reason or ("also could" if chosen else "runs")
            chosen = chosen or reason is None
            lines.append(f"{backend.name}: {verdict}")
        return "\n".join(lines)

    def _first(self, device: str, args: tuple[Any, ...]) -> Backend:
        for backend in self.candidates(device):
            if backend.refuse(*args) is None:
                return backend
        raise AssertionError("the reference refuses nothing")

    def _named(self, name: str, args: tuple[Any, ...]) -> Backend:
        for backend in self.candidates(_device(args)):
            if backend.name == name:
                if (reason := backend.refuse(*args)) is not None:
                    raise ValueError(f"{self.name}: backend {name!r} was asked for but {reason}")
                return backend
        names = [b.name for b in self.candidates(_device(args))]
        raise ValueError(f"{self.name}: no backend {name!r} on {_device(args)}; there are {names}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend inside the block (None: the dispatcher's choice); an op that cannot obey raises ValueError.

    ``VIDGEN_BACKEND=name`` in the environment does the same for a whole process.
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(name: str, *args: Any, **options: Any) -> str:
    """Each implementation of op ``name`` and why these arguments do or do not get it, a line each.

    The arguments are those of the public function ``vidgen.ops.<name>``, or the op's own, all in the order of its
    schema. Nothing is computed.
    """
    global _explained
    if name not in OPS:
        raise ValueError(f"explain: no op {name!r}; there are {sorted(OPS)}")
    op = OPS[name]
    if options or len(args) != len(op.overload._schema.arguments):
        before, _explained = _explained, name
        try:
            getattr(sys.modules["vidgen.ops"], name)(*args, **options)
        except _Reached as reached:
            args = reached.arguments
        finally:
            _explained = before
    return op.explain(*args)


class _Reached(Exception):
    """The op that is being explained was called; with its arguments in the order of its schema."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments


def table(device: str = "cpu") -> dict[str, list[str]]:
    """``{op: [backend names, best first]}`` on a device type, whether or not that device is present."""
    return {name: [b.name for b in op.candidates(device)] for name, op in sorted(OPS.items())}


def _device(args: tuple[Any, ...]) -> str:
    return next(a.device.type for a in args if isinstance(a, torch.Tensor))


def _load(device: str) -> None:
    """Import the backends of a device type when it is first asked for."""
    if device not in _loaded:
        _loaded.add(device)
        importlib.import_module("vidgen.ops._backends").register(device)
