# SPDX-License-Identifier: Apache-2.0
"""Every Ascend C kernel in the CPU twin (rung 6), against the reference in float64 with the battery's bounds."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidgen import ops
from vidgen.ops._backends.ascendc.kernels import KERNELS

from .battery import CPU, DTYPES, OnKernels, battery

PER_TOKEN = "the kernel takes modulations per sample, not per token"


def samples():
    return [
        pytest.param(name, dtype, i, id=f"{name}-{battery.short(dtype)}-{i}")
        for name in KERNELS
        for dtype in DTYPES
        for i in range(len(ops.OPS[name].samples(CPU, torch.float32)))
    ]


@pytest.mark.parametrize("name, dtype, i", samples())
def test_samples(twin, name, dtype, i):
    args = battery.arguments(ops.OPS[name], dtype, i)
    if (reason := KERNELS[name].refuse(*args)) is not None:
        assert reason == PER_TOKEN
        return
    battery.assert_as_accurate_as_eager(OnKernels(name), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=battery.short)
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_stride_and_number_of_cores(twin, name, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    args = ops.OPS[name].random_args(lambda options: data.draw(st.sampled_from(options)), CPU, dtype)
    twin.set_cores(data.draw(st.sampled_from((1, 2, 3, 8, 40, 48))))
    if KERNELS[name].refuse(*args) is None:
        battery.assert_as_accurate_as_eager(OnKernels(name), args)


@pytest.mark.parametrize("name", KERNELS)
def test_results_repeat(twin, name):
    for i in range(3):
        args = battery.arguments(ops.OPS[name], torch.bfloat16, i)
        first, second = (battery.tensors(OnKernels(name)(*args)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def long_sums(name, dtype, tokens, channels=48):
    """Arguments of a gradient that sums over many tokens."""

    def new(*shape):
        return torch.randn(shape).to(dtype)

    rows = [new(1, tokens, channels) for _ in range(4)]
    scale, gate, weight, bias = new(1, channels), new(1, channels), new(channels), new(channels)
    angles = torch.randn(tokens, 8)
    return {
        "adaln_modulate_backward": (*rows[:2], scale, weight, bias, 1e-6),
        "gated_residual_backward": (rows[0], gate, rows[1]),
        "gated_residual_adaln_backward": (*rows[:3], gate, rows[3], scale, weight, bias, 1e-6),
        "qk_norm_rope_backward": (
            *(r.unflatten(-1, (3, 16)) for r in rows[:2]),
            *(weight[:16], "layer", 1e-6, angles.cos(), angles.sin(), "half", None, 1),
        ),
    }[name]


@pytest.mark.parametrize("cores", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=battery.short)
@pytest.mark.parametrize("name", [name for name in KERNELS if name.endswith("_backward")])
def test_long_sums_are_as_accurate_as_eager(twin, name, dtype, cores):
    """Also where one core sums all tokens: eager adds pairwise, and a plain loop in float32 would fall behind."""
    torch.manual_seed(0)
    twin.set_cores(cores)
    battery.assert_as_accurate_as_eager(OnKernels(name), long_sums(name, dtype, 9000))
