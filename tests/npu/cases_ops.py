# SPDX-License-Identifier: Apache-2.0
"""What test_npu_ops.py and test_schemas.py ask, in a process with torch_npu: our ops on the emulated device."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from vidgen import ops
from vidgen.ops._backends.npu import _packing
from vidgen.ops.context_parallel.blocks import attend, attend_backward, merge
from vidgen.ops.skiparse_attention import new_args

from .emulator import NpuEmulator, same_memory
from .emulator_reference import REFERENCE, npu_fusion_attention

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
            with torch.no_grad(), ops.use_backend("npu_torch"):
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


def any_shape_and_stride(name: str, draws: int) -> int:
    """Random arguments, as property tests of the ops draw them; returns how many of them npu_torch took."""
    op, generator, taken = ops.OPS[name], random.Random(0), 0
    backend = next(b for b in op.candidates("npu") if b.name == "npu_torch")
    for i in range(draws):
        torch.manual_seed(i)
        args = op.random_args(generator.choice, CPU, torch.float32)
        there = moved(device, args)
        if backend.refuse(*there) is not None:
            continue
        taken += 1
        compared = (lambda f, a: (tensors(f(*a)), [])) if name == "attention_lse" else None  # -inf has no gradient
        wanted, wanted_grads = compared(op.reference, args) if compared else forward_and_gradients(op, args, True)
        with NpuEmulator(REFERENCE), npu_torch_alone():
            got, grads = compared(op, there) if compared else forward_and_gradients(op, there)
        for y, w in zip([*got, *grads], [*wanted, *wanted_grads], strict=True):
            said = lambda m, i=i: f"{name}, draw {i}: {m}"  # noqa: E731
            torch.testing.assert_close(host(y), w, atol=1e-4, rtol=1e-4, msg=said)
    return taken


def tables_of_each_sample() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 2, 16), torch.randn(2, 3, 8)
    for style, sections in (("half", None), ("interleaved", None), ("half_per_axis", (4, 6, 6))):
        args = (x, angles.cos(), angles.sin(), style, sections)
        op = ops.OPS["rope_3d"]
        wanted, wanted_grads = forward_and_gradients(op, args, reference=True)
        with NpuEmulator(REFERENCE) as emulator, npu_torch_alone():
            got, grads = forward_and_gradients(op, moved(device, args))
        torch.testing.assert_close([host(t) for t in [*got, *grads]], [*wanted, *wanted_grads])
        assert emulator.calls["npu::npu_rotary_mul"] == 2


def eps_is_passed_on() -> None:
    """Samples have torch_npu's default, which would do for them."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 2, 8), torch.randn(8), torch.randn(8)
    rest = (0.5, None, None, "half", None, 1)
    cases = [
        ("qk_norm_rope", (x, x + 1, None, weight, None, None, None, "rms", *rest)),
        ("qk_norm_rope", (x, x + 1, None, weight, None, bias, None, "layer", *rest)),
        ("group_norm_silu", (x.transpose(1, 3), 2, weight, bias, 0.5)),
    ]
    for name, args in cases:
        op = ops.OPS[name]
        wanted, wanted_grads = forward_and_gradients(op, args, reference=True)
        with NpuEmulator(REFERENCE), npu_torch_alone():
            got, grads = forward_and_gradients(op, moved(device, args))
        torch.testing.assert_close([host(t) for t in [*got, *grads]], [*wanted, *wanted_grads])


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


# What samples do not show: which calls are made, and how often.


def attention_calls(f: Callable[[], Any]) -> list[dict[str, Any]]:
    """``f`` on the emulated device: layout, heads, lengths and mask of each call of npu_fusion_attention."""
    made = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(npu_fusion_attention).bind(*args, **kwargs)
        made.append(bound.arguments)
        return npu_fusion_attention(*args, **kwargs)

    with NpuEmulator({**REFERENCE, "npu::npu_fusion_attention": watched}), npu_torch_alone():
        f()
    keep = ("input_layout", "head_num", "actual_seq_kvlen", "actual_seq_qlen", "atten_mask", "scale")
    return [
        {**{k: c[k] for k in keep if k in c and k != "atten_mask"}, "masked": c.get("atten_mask") is not None}
        for c in made
    ]


def draw_qkv(batch: int, queries: int, keys: int, heads: int = 2, dim: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(batch, n, heads, dim) for n in sizes]


def lengths_mask(lengths: Sequence[int], keys: int) -> Tensor:
    return torch.arange(keys)[None] < torch.tensor(lengths)[:, None]


def padded_text_is_packed() -> None:
    """One reading of a mask serves all layers, until the mask changes."""
    q, k, v = draw_qkv(3, 4, 6)
    mask = lengths_mask([2, 6, 3], 6)
    there = [device(t) for t in (q, k, v, mask)]
    readings: list[int] = []
    plain_pack = _packing.pack

    def counted(*args: Any) -> Any:
        readings.append(1)
        return plain_pack(*args)

    def layers() -> None:
        for _ in range(3):
            out = ops.attention(*there[:3], mask=there[3])
            torch.testing.assert_close(host(out), ops.attention(q, k, v, mask=mask))

    with mock.patch.object(_packing, "pack", counted):
        calls = attention_calls(layers)
        assert len(readings) == 1
        with NpuEmulator(REFERENCE):
            there[3][0, 2:] = True
        mask[0, 2:] = True
        calls += attention_calls(layers)
        assert len(readings) == 2
    assert [c["input_layout"] for c in calls] == ["TND"] * 6 and not any(c["masked"] for c in calls)
    assert list(calls[0]["actual_seq_kvlen"]) == [2, 8, 11] and list(calls[0]["actual_seq_qlen"]) == [4, 8, 12]
    assert list(calls[3]["actual_seq_kvlen"]) == [6, 12, 15]
    assert all(c["scale"] == 8**-0.5 for c in calls)


def mask_of_ones_costs_nothing() -> None:
    q, k, v = (device(t) for t in draw_qkv(2, 4, 6))
    mask = device(torch.ones(2, 6, dtype=torch.bool))
    (call,) = attention_calls(lambda: ops.attention(q, k, v, mask=mask))
    assert call["input_layout"] == "BSND" and not call["masked"]


def nothing_seen_gives_zero() -> None:
    """In the packed form, in the masked one and with statistics; gradients stay finite and are 0 there."""
    q, k, v = draw_qkv(2, 3, 5)
    whole = lengths_mask([0, 4], 5)
    some_rows = torch.rand(2, 3, 5) < 0.5
    some_rows[0, 1] = False
    for mask in (whole, some_rows):
        args = (q, k, v, mask, None)
        wanted, wanted_grads = forward_and_gradients(ops.OPS["attention"], args, reference=True)
        with NpuEmulator(REFERENCE), npu_torch_alone():
            got, grads = forward_and_gradients(ops.OPS["attention"], moved(device, args))
            out, lse = ops.attention_lse(*moved(device, args[:3]), mask=device(mask))
        torch.testing.assert_close([host(t) for t in [*got, *grads]], [*wanted, *wanted_grads])
        torch.testing.assert_close([host(out), host(lse)], list(ops.OPS["attention_lse"].reference(*args)))


def masks_of_scores_are_passed_on() -> None:
    q, k, v = draw_qkv(2, 3, 5)
    for shape in ((2, 3, 5), (2, 2, 3, 5)):
        mask = (torch.rand(shape) < 0.7).index_fill(-1, torch.tensor(0), True)
        args = [device(t) for t in (q, k, v, mask)]
        (call,) = attention_calls(lambda args=args: ops.attention(*args[:3], mask=args[3]))
        assert call["masked"] and call["input_layout"] == "BSND"


def more_sequences_than_fit_are_masked() -> None:
    q, k, v = draw_qkv(1001, 1, 2, heads=1, dim=1)
    mask = torch.ones(1001, 2, dtype=torch.bool).index_fill_(0, torch.tensor(5), False)
    mask[7, 1] = False
    out: list[Tensor] = []
    args = [device(t) for t in (q, k, v, mask)]
    (call,) = attention_calls(lambda: out.append(ops.attention(*args[:3], mask=args[3])))
    assert call["masked"] and call["input_layout"] == "BSND"
    torch.testing.assert_close(host(out[0]), ops.attention(q, k, v, mask=mask))


def skiparse_is_one_call(pattern: str, text: int, masks: str, heads: int, batch: int) -> dict[str, Any]:
    """The one call, after its result and gradients have been compared with the reference."""
    torch.manual_seed(0)
    mask = lengths_mask([11, 14][:batch], 16) if "video" in masks else None
    text_mask = lengths_mask([1, text][:batch], text) if "text" in masks else None
    tokens = 13 if "padding" in masks else 16
    args = new_args(batch, tokens, heads, 4, 2, pattern, text, CPU, torch.float32, mask=mask, text_mask=text_mask)
    op = ops.OPS["skiparse_attention"]
    wanted, wanted_grads = forward_and_gradients(op, args, reference=True)
    got: list[Any] = []
    (call,) = attention_calls(lambda: got.extend(forward_and_gradients(op, moved(device, args))))
    torch.testing.assert_close([host(t) for t in [*got[0], *got[1]]], [*wanted, *wanted_grads], atol=1e-5, rtol=1e-5)
    return call


def in_fake_mode() -> None:
    """Masks without values go along as masks; shapes are those of the CPU's."""
    q, k, v = draw_qkv(2, 16, 16)
    mask = lengths_mask([11, 14], 16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t).to("npu").requires_grad_(t.is_floating_point()) for t in (q, k, v, mask)]
        assert type(fakes[0]) is FakeTensor
        for out in (
            ops.attention(*fakes[:3], mask=fakes[3]),
            ops.skiparse_attention(*fakes[:3], mask=fakes[3], sparse_n=2, pattern="group"),
            ops.skiparse_attention(*(t[:, :13] for t in fakes[:3]), sparse_n=2, pattern="single"),
        ):
            assert isinstance(out, Tensor) and out.device.type == "npu" and out.shape[2:] == q.shape[2:]
            out.sum().backward()
        assert fakes[0].grad is not None and fakes[0].grad.shape == q.shape


def ring_of_blocks() -> None:
    """A ring's blocks of keys, merged and differentiated by torch_npu's ops, equal attention to all keys."""
    torch.manual_seed(0)
    q, k, v = draw_qkv(3, 5, 9)
    grad = torch.randn(q.shape)
    mask = lengths_mask([2, 9, 0], 9)  # the first sample sees nothing of the later blocks, the last nothing at all
    mask[1, 3:5] = False
    wanted, wanted_lse = ops.OPS["attention_lse"].reference(q, k, v, mask, None)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted_grads = torch.autograd.grad(ops.OPS["attention"].reference(*leaves, mask, None), leaves, grad)
    dq, dk, dv, dmask, dgrad = (device(t) for t in (q, k, v, mask, grad))
    parts = [slice(0, 3), slice(3, 5), slice(5, 9)]
    with NpuEmulator(REFERENCE) as emulator, npu_torch_alone(), torch.no_grad():
        total = None
        for p in parts:
            total = merge(total, attend(dq, dk[:, p], dv[:, p], dmask[:, p], None))
        assert total is not None
        shares = [attend_backward(dgrad, dq, dk[:, p], dv[:, p], *total, dmask[:, p], None) for p in parts]
        grad_q = sum(share[0] for share in shares)
        grads = [grad_q, *(torch.cat([share[i] for share in shares], 1) for i in (1, 2))]
    torch.testing.assert_close([host(t) for t in total], [wanted, wanted_lse])
    torch.testing.assert_close([host(t) for t in grads], list(wanted_grads))
    assert emulator.calls["npu::npu_ring_attention_update"] == 2
    assert emulator.calls["npu::npu_fusion_attention"] == emulator.calls["npu::npu_fusion_attention_grad"] == 3


def gradient_of_rows_that_saw_nothing() -> None:
    op = ops.OPS["attention_backward"]
    torch.manual_seed(0)
    grad, q, k, v, out, lse, _, scale = op.samples(CPU, torch.float32)[1]
    lse[0, 1, 1] = -torch.inf
    args = (grad, q, k, v, out, lse, None, scale)
    wanted = op.reference(*args)
    assert wanted[0][0, 1, 1].abs().max() == 0
    with NpuEmulator(REFERENCE) as emulator, npu_torch_alone():
        got = op(*moved(device, args))
    torch.testing.assert_close([host(t) for t in got], list(wanted))
    assert emulator.calls["npu::npu_fusion_attention_grad"] == 1


def merge_of_rows_that_saw_nothing() -> None:
    torch.manual_seed(0)
    out = [torch.randn(2, 3, 2, 8) for _ in range(2)]
    lse = [torch.randn(2, 2, 3) for _ in range(2)]
    for part, rows in ((0, [0, 1]), (1, [1, 2])):  # of the first sample: only the second, neither, only the first
        lse[part][0][:, rows] = -torch.inf
        out[part][0][rows] = 0
    lse[0][1], lse[1][1] = 1e4, -1e4
    args = (out[0], lse[0], out[1], lse[1])
    wanted = ops.merge_attention(*args)
    with NpuEmulator(REFERENCE) as emulator, npu_torch_alone():
        got = ops.merge_attention(*moved(device, args))
    torch.testing.assert_close([host(t) for t in got], list(wanted))
    assert emulator.calls["npu::npu_ring_attention_update"] == 1 and host(got[1])[0, 0, 1] == -torch.inf
