# SPDX-License-Identifier: Apache-2.0
"""VIDGEN_STRICT: whatever would run on the reference without having been asked to is an error that says why."""

import os
import subprocess
import sys

import pytest
import torch

from vidgen import ops
from vidgen.ops import _registry

CPU = torch.device("cpu")
ROWS = """
import torch
from vidgen import ops
x = torch.ones(1, 2, 3, dtype=torch.{dtype})
print(ops.adaln_modulate(x, x, x).shape)
"""


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setattr(_registry, "_strict", True)


def run(dtype, **environment):
    environment = {**os.environ, "VIDGEN_BACKEND": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", ROWS.format(dtype=dtype)], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("op", ops.OPS.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_explain_calls_the_reference_is_an_error_and_nothing_else(op, dtype, native, strict):
    for args in op.samples(CPU, dtype):
        best = op.explain(*args).splitlines()[0]
        if best.endswith(": runs"):
            op(*args)
        else:
            with pytest.raises(RuntimeError, match=f"{op.name}: VIDGEN_STRICT is set.* refused"):
                op(*args)


@pytest.mark.parametrize("op", [op for op in ops.OPS.values() if op.composite is None], ids=lambda op: op.name)
def test_float64_has_no_kernel_and_is_served_where_nobody_is_strict(op, native, monkeypatch):
    args = op.samples(CPU, torch.float64)[1]
    op(*args)
    if op.name == "skiparse_groups":  # it only moves, any dtype
        return
    monkeypatch.setattr(_registry, "_strict", True)
    with pytest.raises(RuntimeError, match="refused .*float64"):
        op(*args)


def test_results_written_into_given_memory_are_no_exception(native, strict):
    x, shift = torch.randn(1, 4, 8), torch.randn(1, 8)
    ops.adaln_modulate(x, shift, shift, out=torch.empty_like(x))
    with pytest.raises(RuntimeError, match="adaln_modulate: VIDGEN_STRICT is set"):
        ops.adaln_modulate(x.double(), shift.double(), shift.double(), out=torch.empty_like(x.double()))


def test_gradients_are_no_exception(native, strict):
    x = torch.randn(1, 4, 8, requires_grad=True)
    shift, rows = torch.randn(1, 8), torch.randn(1, 4, 8, requires_grad=True)
    ops.adaln_modulate(x, shift, shift).sum().backward()
    result = ops.adaln_modulate(x, rows, rows)
    with pytest.raises(RuntimeError, match="adaln_modulate_backward: VIDGEN_STRICT is set.*per token"):
        result.sum().backward()


def test_a_reference_that_was_asked_for_is_no_fallback(strict):
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    with ops.use_backend("reference"):
        ops.adaln_modulate(x, x, x)


def test_the_environment_sets_it():
    assert run("float64", VIDGEN_STRICT="0").returncode == 0
    refused = run("float64", VIDGEN_STRICT="1")
    assert refused.returncode != 0 and "adaln_modulate: VIDGEN_STRICT is set" in refused.stderr


def test_missing_kernels_are_an_error_that_says_why_they_are_missing():
    assert run("float32", VIDGEN_NATIVE="0", VIDGEN_STRICT="").returncode == 0
    refused = run("float32", VIDGEN_NATIVE="0", VIDGEN_STRICT="1")
    assert refused.returncode != 0 and "compiled kernels: switched off by VIDGEN_NATIVE=0" in refused.stderr
