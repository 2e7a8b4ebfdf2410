# SPDX-License-Identifier: Apache-2.0
"""The library of kernels is loaded only where it is whole and built for this PyTorch; else each op says why not."""

import json

import pytest
import torch

from vidgen import ops
from vidgen.ops._backends.ascendc import _library
from vidgen.ops._backends.ascendc.kernels import KERNELS


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the library would lie; what this process knows of it comes back afterwards."""
    monkeypatch.setattr(_library, "BUILT", tmp_path / "_ascendc.so")
    monkeypatch.setattr(_library, "status", "not looked for")
    return tmp_path


def put(place, version):
    (place / "_ascendc.so").write_bytes(b"not a library")
    (place / "_ascendc.build.json").write_text(json.dumps({"torch": version}))


def test_not_built(place):
    assert _library.find() == "the Ascend C kernels are not built (_ascendc.so); see npu_kernels/README.md"


def test_built_for_another_torch(place):
    put(place, "1.2.3")
    assert _library.find() == f"_ascendc.so is built for torch 1.2.3, this is torch {torch.__version__}"


def test_cannot_be_loaded(place):
    put(place, torch.__version__)
    assert _library.find().startswith("_ascendc.so cannot be loaded: ")


def test_every_op_gives_the_reason(place):
    reason = _library.find()
    for name, kernel in KERNELS.items():
        args = ops.OPS[name].samples(torch.device("cpu"), torch.float32)[1]
        assert kernel.refuse(*args) == reason
