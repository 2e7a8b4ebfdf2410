# SPDX-License-Identifier: Apache-2.0
"""How an op chooses among the backends of a device: in order, by what they refuse, or by name."""

import pytest
import torch

from vidgen import ops
from vidgen.ops._registry import Backend

# One opaque op whose backends on a CPU are chosen in Python, and one composite.
OPAQUE, COMPOSITE = ops.OPS["attention_lse"], ops.OPS["attention"]


@pytest.fixture(params=[OPAQUE, COMPOSITE], ids=lambda op: op.name)
def op(request, monkeypatch):
    """With a backend of its own list, which tests may change."""
    monkeypatch.setitem(request.param.backends, "cpu", list(request.param.backends.get("cpu", [])))
    return request.param


def args(**options):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 4, **options) for _ in range(3))
    return q, k, v, None, None


def spy(op, name, reason=None):
    """A backend in front of the others that counts its calls and computes as the reference does."""
    calls = []

    def run(*given):
        calls.append(given)
        return op.reference(*given)

    op.backends["cpu"].insert(0, Backend(name, run, lambda *given: reason))
    return calls


def test_the_first_that_does_not_refuse_runs(op):
    second, first = spy(op, "second"), spy(op, "first", "it is Monday")
    op(*args())
    assert not first and len(second) == 1
    assert op.explain(*args()).splitlines()[:2] == ["first: it is Monday", "second: runs"]


def test_gradients_flow_through_the_chosen_one(op):
    calls = spy(op, "ours")
    given = args(requires_grad=True)
    result = op(*given)
    out = result[0] if isinstance(result, tuple) else result
    (grad,) = torch.autograd.grad(out.square().sum(), given[:1])
    expected = op.reference(*given)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), given[:1])[0])
    assert len(calls) == 1


def test_one_asked_for_by_name_runs_with_gradients(op):
    calls = spy(op, "ours")
    spy(op, "in front")
    with ops.use_backend("ours"):
        result = op(*args(requires_grad=True))
    assert len(calls) == 1
    assert (result[0] if isinstance(result, tuple) else result).requires_grad


def test_one_asked_for_by_name_that_refuses_is_an_error(op):
    spy(op, "ours", "it is Monday")
    with ops.use_backend("ours"), pytest.raises(ValueError, match="'ours' was asked for but it is Monday"):
        op(*args())


def test_the_reference_can_be_asked_for_where_others_run(op):
    calls = spy(op, "ours")
    with ops.use_backend("reference"):
        op(*args())
    assert not calls


def test_backends_of_a_device_are_looked_for_when_it_is_first_asked_for():
    """Also where that device is not: tables and reports speak of it."""
    table = ops.table("cuda")
    assert table["adaln_modulate"] == ["triton", "reference"]
    assert table["skiparse_groups"][0] == "strided_copies" and table["attention_lse"][0] == "flash_cuda"
    assert ops.table("npu")["adaln_modulate"][-2:] == ["triton", "reference"]
