# SPDX-License-Identifier: Apache-2.0
"""The battery over the Triton backend of one op, in Triton's interpreter; test_interpreter.py runs it for each.

TRITON_INTERPRET=1 VIDGEN_NATIVE=0 OP=adaln_modulate python -m pytest tests/triton/one_op.py
"""

import dataclasses
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vidgen import ops

interpreter = importlib.import_module("triton.runtime.interpreter")


def load_battery():
    path = Path(__file__).parents[1] / "ops" / "test_all_ops.py"
    spec = importlib.util.spec_from_file_location("battery", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


battery = load_battery()
OP = ops.OPS[os.environ["OP"]]
CPU = torch.device("cpu")
EXAMPLES, LARGEST = 6, 2500  # elements: the interpreter needs milliseconds where a device needs microseconds
SAMPLES = range(len(OP.samples(CPU, torch.float32)))
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
runs = {"count": 0}
patched = set()


def over(first, *others):
    """All samples in the first dtype, and each in one of the others, which differ in how memory is read and written."""
    pairs = [(first, i) for i in SAMPLES] + [(others[i % len(others)], i) for i in SAMPLES if others]
    return pytest.mark.parametrize("dtype, i", [pytest.param(d, i, id=f"{battery.short(d)}-{i}") for d, i in pairs])


def count_runs(backend):
    def run(*args):
        runs["count"] += 1
        return backend.run(*args)

    return dataclasses.replace(backend, run=run)


OP.backends["cpu"] = [count_runs(b) if b.name == "triton" else b for b in OP.backends["cpu"]]


def round_as_devices_do(input, input_dtype, output_dtype, rounding_mode, _plain=interpreter._convert_float):
    """float32 to bfloat16 to nearest, ties to even; the interpreter itself cuts off the last bits."""
    names = (input_dtype.name, output_dtype.name)
    if names != ("fp32", "bf16"):
        return _plain(input, input_dtype, output_dtype, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(input).view(np.float32).copy()).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def patch_once(fn, _plain=interpreter._patch_lang):
    """The interpreter puts its functions into triton.language again whenever a helper is called: most of its time."""
    languages = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
    if languages not in patched:
        patched.add(languages)
        _plain(fn)
    return interpreter._LangPatchScope()  # holds nothing to be undone


interpreter._convert_float = round_as_devices_do


def multiply_as_devices_do(self, a, b, d, *rest, _plain=interpreter.InterpreterBuilder.create_dot):
    """The interpreter multiplies the bits of bfloat16 as if they were whole numbers."""

    def wide(x):
        if x.dtype.scalar.name != "bf16":
            return x
        bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    return _plain(self, wide(a), wide(b), d, *rest)


interpreter.InterpreterBuilder.create_dot = multiply_as_devices_do
interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def the_kernel_ran(request):
    """A test in which something else answered proves nothing."""
    before = runs["count"]
    yield
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "i" in params:
        taken = OP.explain(*battery.arguments(OP, **params)).startswith("triton: runs")
        assert (runs["count"] > before) == taken


def test_the_interpreter_is_what_runs():
    assert ops.native_status is not None
    assert ops.table("cpu")[OP.name][0] == "triton"
    verdicts = [OP.explain(*battery.arguments(OP, F32, i)).splitlines()[0] for i in SAMPLES]
    taken = [v for v in verdicts if v == "triton: runs"]
    assert len(taken) > len(verdicts) / 2, verdicts


@over(F32, BF16, F16)
def test_values(dtype, i):
    battery.test_error_is_at_most_twice_that_of_eager(OP, dtype, i)


@over(F32)
def test_every_output_is_written_and_nothing_else(dtype, i, monkeypatch):
    """The same from run to run, whatever lay in the memory before, and the inputs left alone."""
    args = battery.arguments(OP, dtype, i)
    before = battery.mapped(torch.clone, args)
    expected = battery.tensors(OP(*args))
    poison_new_tensors(monkeypatch)
    got = battery.tensors(OP(*args))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(battery.tensors(args), battery.tensors(before), strict=True))
    memory = [t.untyped_storage().data_ptr() for t in got if t.numel()]
    assert len(set(memory)) == len(memory), "two results share memory"


if OP.differentiable:

    @over(F32)  # the ops of the gradients have batteries of their own
    def test_gradients_are_as_accurate_as_eager(dtype, i):
        battery.test_gradients_are_as_accurate_as_eager(OP, dtype, i)

    @over(F32)
    def test_a_row_of_a_batch_equals_the_call_on_that_row(dtype, i):
        battery.test_a_row_of_a_batch_equals_the_call_on_that_row(OP, dtype, i)


def poison_new_tensors(monkeypatch):
    """NaN in all memory that is allocated without a value."""

    def poisoned(allocate):
        def new(*args, **options):
            t = allocate(*args, **options)
            return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(85)

        return new

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=battery.short)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_any_shape_and_stride(dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    args = OP.random_args(lambda options: data.draw(st.sampled_from(options)), CPU, dtype)
    assume(sum(t.numel() for t in battery.tensors(args)) <= LARGEST)
    battery.assert_as_accurate_as_eager(OP, args)
