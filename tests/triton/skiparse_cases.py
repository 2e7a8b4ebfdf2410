# SPDX-License-Identifier: Apache-2.0
"""Skiparse attention in Triton's interpreter where groups fill whole tiles, which the samples of the battery do not.

TRITON_INTERPRET=1 VIDGEN_NATIVE=0 OP=skiparse_attention_lse python -m pytest tests/triton/skiparse_cases.py
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from vidgen import ops
from vidgen.ops._backends.triton import skiparse_attention as kernels
from vidgen.ops.skiparse_attention import new_args

# It repairs what the interpreter gets wrong about bfloat16.
spec = importlib.util.spec_from_file_location("one_op", Path(__file__).with_name("one_op.py"))
spec.loader.exec_module(importlib.util.module_from_spec(spec))

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16

# tokens, sparse_n, pattern, text, grouped: tiles are 16 rows long in the interpreter
CASES = [
    (48, 1, "single", 0, False),  # dense, and full
    (64, 2, "group", 16, False),
    (64, 2, "group", 0, True),
    (63, 2, "group", 17, True),  # padded: with it the tiles would be full
    (150, 3, "group", 0, False),  # a ratio that is no power of two
    (160, 3, "group", 5, True),
    (100, 4, "single", 0, False),
]


def arguments(case, dtype, masked, dim=8):
    tokens, sparse_n, pattern, text, grouped = case
    torch.manual_seed(tokens)
    mask = torch.rand(1, tokens) < 0.6 if masked else None
    text_mask = torch.rand(1, text) < 0.6 if masked and text else None
    return new_args(
        1, tokens, 1, dim, sparse_n, pattern, text, CPU, dtype, mask=mask, text_mask=text_mask, grouped=grouped
    )


def forward_and_backward(op, args):
    """The results and the gradients of q, k, v and the text's."""
    wanted = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    args = [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]
    results = op(*args)
    torch.manual_seed(0)
    # A log-sum-exp of -inf has no gradient.
    upstream = [torch.randn(r.shape).to(r.dtype) * r.detach().isfinite() for r in results]
    return *results, *torch.autograd.grad(results, [args[i] for i in wanted], upstream)


def assert_close(case, dtype, masked, dim=8):
    args = arguments(case, dtype, masked, dim)
    op = ops.OPS["skiparse_attention_lse"]
    assert op.explain(*args).splitlines()[0] == "triton: runs"
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    tolerance = 64 * torch.finfo(dtype).eps if dtype == F32 else 4 * torch.finfo(dtype).eps
    for ours, truth in zip(forward_and_backward(op, args), forward_and_backward(op, wide), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, masked):
    assert_close(case, F32, masked)


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_values_and_gradients_in_bfloat16(case):
    assert_close(case, BF16, True)


@pytest.mark.parametrize("dim", [16, 20, 40])
def test_widths_of_heads(dim):
    assert_close((40, 2, "group", 3, False), F32, False, dim)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_one_run_per_tile_as_on_ascend(case, monkeypatch):
    """There the runs of the pattern "group" are visited one after the other."""
    monkeypatch.setattr(kernels, "TWO_LEVELS", ())
    groups = kernels.groups_of(arguments(case, F32, False)[0], case[1], "group", case[4], case[0])
    assert (groups.columns, groups.in_tile) == (2, 1)
    assert_close(case, F32, True)


def test_tiles_and_queries_of_which_nothing_is_shown():
    """The first tile of keys is hidden from everyone, and in the second sample everything."""
    args = list(new_args(2, 64, 1, 8, 2, "single", 0, CPU, F32))
    args[8] = torch.arange(64).expand(2, -1) >= torch.tensor([[40], [64]])
    out, lse, *_ = ops.OPS["skiparse_attention_lse"](*args)
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert not out[1].count_nonzero() and (lse[1] == -torch.inf).all()
    q, k, v = (t.requires_grad_() for t in args[:3])
    out, lse, *_ = ops.OPS["skiparse_attention_lse"](*args)
    for grad in torch.autograd.grad(out.sum() + lse[0].sum(), (q, k, v)):
        assert grad.isfinite().all() and grad[0].count_nonzero() and not grad[1].count_nonzero()
