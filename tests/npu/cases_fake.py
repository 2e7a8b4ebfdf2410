# SPDX-License-Identifier: Apache-2.0
"""The four systems at their real sizes with fake tensors on device npu: shapes, dtypes and devices, no numbers.

A fake tensor of an opaque op comes from what the op registered, not from a backend. So each call of such an op that is
the first with its shapes also runs the implementation that the device would get, on fake tensors, and that must give
what the op promised.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from vidgen.ops._registry import Op

from .systems import Size, build_transformer, build_vae, latent_size, transformer_inputs

_library = torch.library.Library("npu", "IMPL")


def group_norm_swish_grad(grad: Tensor, input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *_: Any) -> Any:
    return torch.empty_like(input), torch.empty_like(weight), torch.empty_like(bias)


_library.impl("npu_group_norm_swish_grad", group_norm_swish_grad, "Meta")  # torch_npu has none of its own

Call = tuple[str, list[Any], list[Any]]  # operator, shapes and dtypes that go in and come out


def described(values: Any) -> list[Any]:
    leaves = (leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor))
    return [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in leaves]


def devices(values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)}


@dataclass
class Records:
    vidgen: list[Call] = field(default_factory=list)  # ops of the library, as models call them
    npu: list[Call] = field(default_factory=list)  # operators of torch_npu
    astray: list[Call] = field(default_factory=list)  # with a result that is not on the device
    unequal: list[str] = field(default_factory=list)  # implementations that do not give what their op promises


class Recorder(TorchDispatchMode):
    def __init__(self, device: str, records: Records) -> None:
        super().__init__()
        self.device, self.records = device, records
        self.tried: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        result = func(*args, **kwargs)
        if devices(args) == {self.device} and devices(result) - {self.device}:
            self.records.astray.append((name, described(args), described(result)))
        if func.namespace == "npu":
            self.records.npu.append((name, described(args), described(result)))
        if func.namespace == "vidgen" and self.device == "npu":
            key = f"{name} {[(t, tuple(t.shape), t.stride()) if isinstance(t, Tensor) else t for t in args]}"
            if key not in self.tried:
                self.tried.add(key)
                with self:
                    real = func._op_dk(torch._C.DispatchKey.PrivateUse1, *args, **kwargs)
                if layout(real) != layout(result):
                    self.records.unequal.append(f"{name}: {layout(real)}, promised {layout(result)}")
        return result


def layout(values: Any) -> list[Any]:
    leaves = (leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor))
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in leaves]


@contextlib.contextmanager
def recording(device: str) -> Iterator[Records]:
    """Record what is called inside. Of an op that calls others, only it counts: backends differ in what they call."""
    records, depth, original = Records(), 0, Op.__call__

    def call(op: Op, *args: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            result = original(op, *args)
        finally:
            depth -= 1
        if depth == 0:
            records.vidgen.append((op.name, described(args), described(result)))
        return result

    with mock.patch.object(Op, "__call__", call), Recorder(device, records):
        yield records


@contextlib.contextmanager
def fake(device: str) -> Iterator[None]:
    """New tensors are fake, on the device and, where nobody says otherwise, bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def compare(build: Callable[[], nn.Module], call: Callable[[nn.Module], Any], backward: bool = False) -> dict[str, Any]:
    """Call the model on both devices; with ``backward``, the gradients of its parameters on npu too."""
    with fake("cpu"):
        model = build()
        with recording("cpu") as here:
            wanted = call(model)
    with fake("npu"):
        model = build()
        with recording("npu") as there:
            got = call(model)
            forward = list(there.vidgen)
            if backward:
                got.float().square().mean().backward()
    assert [name for name, _, _ in forward] == [name for name, _, _ in here.vidgen]
    wrong = [(a, b) for a, b in zip(forward, here.vidgen, strict=True) if a != b]
    assert not wrong, wrong[:3]
    assert described(got) == described(wanted) and devices(got) == {"npu"}
    assert not there.astray, there.astray[:3]
    assert not there.unequal, "\n".join(there.unequal[:5])
    parameters = list(model.parameters())
    if backward:
        assert all(described(p.grad) == described(p) for p in parameters if p.grad is not None)
        assert sum(p.grad is not None for p in parameters) > 0.9 * len(parameters)
        assert devices([p.grad for p in parameters]) == {"npu"}
    return {
        "vidgen": dict(Counter(name for name, _, _ in there.vidgen)),
        "npu": dict(Counter(name for name, _, _ in there.npu)),
        "parameters": sum(p.numel() for p in parameters),
        "results": [shape for shape, _ in described(got)],
        "shapes": [f"{n} x {call}" for call, n in Counter(map(in_words, there.vidgen + there.npu)).items()],
    }


def in_words(call: Call) -> str:
    """``npu::npu_rms_norm 1x8x64 bfloat16, 64 bfloat16 -> 1x8x64 bfloat16, 1x8x1 float32``"""
    name, *sides = call
    texts = (", ".join(f"{'x'.join(map(str, shape)) or 'scalar'} {dtype}" for shape, dtype in side) for side in sides)
    return f"{name} {' -> '.join(texts)}"


def transformer(system: str, preset: str, video: Size, backward: bool) -> dict[str, Any]:
    def call(model: Any) -> Tensor:
        return model(**transformer_inputs(system, model.config, video, torch.empty))

    return compare(lambda: build_transformer(system, preset), call, backward)


def autoencoder(system: str, video: Size, encode: bool) -> dict[str, Any]:
    """The video that a latent decodes to, and the moments of a video."""

    @torch.no_grad()
    def call(model: Any) -> list[Tensor]:
        channels = getattr(model.config, "latent_channels", None) or model.config.latent_dim
        decoded = model.decode(torch.empty(1, channels, *latent_size(system, video)))
        return [decoded, model.encode_moments(torch.empty(1, 3, *video))] if encode else [decoded]

    return compare(lambda: build_vae(system, "released"), call)


def autoencoder_gradients(system: str, video: Size) -> dict[str, Any]:
    """There and back, with the gradient of every parameter."""

    def call(model: Any) -> Tensor:
        moments = model.encode_moments(torch.empty(1, 3, *video))
        return model.decode(moments[:, : moments.shape[1] // 2])

    return compare(lambda: build_vae(system, "released"), call, backward=True)
