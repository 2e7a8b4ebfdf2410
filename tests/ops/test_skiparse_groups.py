# SPDX-License-Identifier: Apache-2.0
"""The copies that accelerators make, which the CPU's battery does not reach: they run anywhere."""

import importlib
import random

import pytest
import torch

from vidgen import ops

OP = ops.OPS["skiparse_groups"]
place = importlib.import_module("vidgen.ops._backends.strided_copies").skiparse_groups
CPU = torch.device("cpu")


def assert_same(args, monkeypatch):
    expected = OP.reference(*args)
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: plain(t, *a, **k).fill_(float("nan")))
    got = place(*args)
    monkeypatch.undo()
    assert torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.parametrize("i", range(len(OP.samples(CPU, torch.float32))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_copied_to_its_place(dtype, i, monkeypatch):
    torch.manual_seed(i)
    assert_same(OP.samples(CPU, dtype)[i], monkeypatch)


def test_any_shape_and_stride(monkeypatch):
    choose = random.Random(0).choice
    for _ in range(200):
        assert_same(OP.random_args(choose, CPU, torch.float32), monkeypatch)
