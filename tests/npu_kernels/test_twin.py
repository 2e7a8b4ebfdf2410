# SPDX-License-Identifier: Apache-2.0
"""The CPU twin catches each kind of fault; a twin that let one pass would prove nothing about the kernels."""

import ctypes
from pathlib import Path

import pytest
import torch

from vidgen import ops
from vidgen.ops._backends.ascendc.kernels import KERNELS

from .battery import OnKernels, battery
from .twin import compile_library

SAID = {
    "none": "",
    "unified buffer too small": "unified buffer overflow",
    "buffer length not whole blocks": "not a multiple of 32 bytes",
    "unaligned address": "not 32-byte aligned",
    "past a local tensor": "past the end of a LocalTensor",
    "scalar past a local tensor": "past the end of a LocalTensor",
    "read past global memory": "reads past the end of a GlobalTensor",
    "write past global memory": "writes past the end of a GlobalTensor",
    "tensor longer than its memory": "longer than the buffer",
    "memory the host never named": "the host never named|outside its buffer",
    "write to an input": "a write to an input",
    "output not written": "256 bytes are missing",
    "output written in part": "4 bytes are missing",
    "output written twice": "written twice",
    "too many blocks in a copy": "blockCount must be 1 to 4095",
    "mask larger than a repeat": "mask does not fit",
    "too many repeats": "repeatTime must be 1 to 255",
    "stride too wide": "0 to 255 blocks",
    "gather past its source": "Gather: past the end",
    "gather between elements": "not a multiple of the element's size",
    "no tensor left": "every tensor of the queue is in use",
    "take from an empty queue": "the queue is empty",
    "free twice": "FreeTensor: not a tensor",
    "tensor never freed": "was not freed",
    "vector before copy": "Add on pipe V follows a write on MTE2, and nothing orders them",
    "copy before vector": "DataCopyPad on pipe MTE3 follows a write on V",
    "copy over what is read": "DataCopyPad on pipe MTE2 overwrites what is read on V",
    "vector after vector": "Add on pipe V follows a write on V",
    "scalar after vector": "GetValue on pipe S follows a write on V",
    "vector after scalar": "Adds on pipe V follows a write on S",
    "too many events": "no event id is left",
    "flag nobody waits for": "a flag that nobody waited for",
    "flag nobody sets": "nothing sets the flag",
    "flag set twice": "set already",
}


@pytest.fixture(scope="module")
def faults(built):
    library = compile_library(Path(__file__).with_name("faults.cpp"))
    for name in ("fault", "names", "wrong_tiling"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def test_every_fault_has_its_sentence(faults):
    assert set(faults.names().decode().splitlines()) == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_fault_is_caught(faults, name):
    said = faults.fault(name.encode()).decode()
    assert bool(said) == bool(SAID[name]), said
    assert any(part in said for part in SAID[name].split("|")), said


@pytest.mark.parametrize(
    "wrong, expected",
    [
        ("nothing", ""),
        ("left out", "an output is not written whole"),
        ("twice", "written twice"),
        ("too long", "unified buffer overflow"),
    ],
)
def test_a_wrong_tiling_of_a_real_kernel_is_caught(faults, wrong, expected):
    said = faults.wrong_tiling(wrong.encode()).decode()
    assert bool(said) == bool(expected) and expected in said


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_needs_its_barriers_and_the_twin_sees_it(twin, name):
    args = battery.arguments(ops.OPS[name], torch.float32, 1)
    OnKernels(name)(*args)
    with twin.ignoring_barriers(), pytest.raises(RuntimeError, match="on pipe V follows a write on V"):
        OnKernels(name)(*args)
