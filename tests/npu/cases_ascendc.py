# SPDX-License-Identifier: Apache-2.0
"""What test_ascendc.py asks, in a process with torch_npu: our Ascend C kernels, in the CPU twin, on npu tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vidgen import ops
from vidgen.ops._backends.ascendc import _library
from vidgen.ops._backends.ascendc.kernels import KERNELS

from .cases_ops import CPU, device, forward_and_gradients, host, moved, tensors
from .emulator import NpuEmulator
from .emulator_reference import REFERENCE

PER_TOKEN = "the kernel takes modulations per sample, not per token"


def says_why_not() -> str:
    """What explain says of npu_ascendc where nothing is built; to be asked before anything else."""
    args = moved(device, ops.OPS["adaln_modulate"].samples(CPU, torch.float32)[1])
    return next(line for line in ops.explain("adaln_modulate", *args).splitlines() if line.startswith("npu_ascendc"))


def load(library: str) -> None:
    ops.table("npu")  # backends join before, as on a machine where the library lies beside the package
    if _library.status is not None:
        _library.load(Path(library))


def samples_equal(library: str, name: str, dtype: str) -> dict[str, Any]:
    """Results and gradients of every sample that the kernels take; returns their calls and refusals."""
    load(library)
    op, kind = ops.OPS[name], getattr(torch, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[kind]
    calls: set[str] = set()
    refused = []
    torch.manual_seed(0)
    for i, args in enumerate(op.samples(CPU, kind)):
        there = moved(device, args)
        first = ops.explain(name, *there).splitlines()[0]
        if first != "npu_ascendc: runs":
            refused.append(first.removeprefix("npu_ascendc: "))
            continue
        wanted, wanted_grads = forward_and_gradients(op, args, reference=True)
        with NpuEmulator(REFERENCE) as emulator:
            with torch.no_grad():
                plain = tensors(op(*there))
            got, grads = forward_and_gradients(op, there)
        assert all(y.device.type == "npu" for y in got)
        calls |= {call.removeprefix("vidgen_ascendc::") for call in emulator.calls if call.startswith("vidgen_ascendc")}
        for y, w in zip([*plain, *got, *grads], [*wanted, *wanted, *wanted_grads], strict=True):
            said = lambda m, i=i: f"{name}, sample {i}: {m}"  # noqa: E731
            torch.testing.assert_close(host(y), w, atol=tolerance, rtol=tolerance, msg=said)
        assert [y.stride() for y in got] == [y.stride() for y in tensors(op.fake(*args))], f"{name}, sample {i}"  # type: ignore[misc]
    return {"calls": sorted(calls), "refused": sorted(set(refused))}


def float64_is_refused(library: str) -> list[str]:
    """What each op says to arguments that no kernel takes."""
    load(library)
    said = []
    for name in KERNELS:
        args = moved(device, ops.OPS[name].samples(CPU, torch.float64)[1])
        said.append(ops.explain(name, *args).splitlines()[0])
    return said


def forced_backend_obeys_or_raises(library: str) -> str:
    load(library)
    x, shift = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    wanted = ops.adaln_modulate(x, shift[:, 0], shift[:, 1])
    with NpuEmulator(REFERENCE), ops.use_backend("npu_ascendc"):
        y = ops.adaln_modulate(x.npu(), shift[:, 0].npu(), shift[:, 1].npu())
        torch.testing.assert_close(host(y), wanted, atol=1e-5, rtol=1e-5)
        try:
            ops.adaln_modulate(x.npu(), shift.npu(), shift.npu())
        except ValueError as error:
            return str(error)
    return ""


def internal_format_is_refused(library: str) -> str:
    import torch_npu

    load(library)
    fractal = 29  # ACL_FORMAT_FRACTAL_NZ
    x = torch_npu.empty_with_format((2, 32, 32), dtype=torch.float16, device="npu", acl_format=fractal)
    assert torch_npu.get_npu_format(x) == fractal
    shift = torch.zeros(2, 32, dtype=torch.float16).npu()
    try:
        torch.ops.vidgen_ascendc.adaln_modulate(x, shift, shift, None, None, 1e-6)
    except RuntimeError as error:
        return str(error)
    return ""
