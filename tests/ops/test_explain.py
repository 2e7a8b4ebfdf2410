# SPDX-License-Identifier: Apache-2.0
"""`ops.explain` takes what a user has at hand: the arguments of the public function."""

import pytest
import torch

from vidgen import ops


def test_explain_takes_the_public_functions_arguments():
    x, shift = torch.randn(1, 8, 16), torch.randn(1, 16)
    lines = ops.explain("adaln_modulate", x, shift, shift, eps=1e-5).splitlines()
    assert [line.split(":")[0] for line in lines] == ops.table()["adaln_modulate"]
    q = torch.randn(1, 16, 2, 8)
    assert "composite: runs" in ops.explain("skiparse_attention", q, q, q, sparse_n=2, pattern="single")


def test_explain_of_wrong_arguments_says_what_the_call_would_and_leaves_no_trace():
    x = torch.randn(1, 8, 16)
    with pytest.raises(ValueError, match="adaln_modulate: shift must be"):
        ops.explain("adaln_modulate", x, torch.randn(1, 15), torch.randn(1, 15))
    with pytest.raises(TypeError, match="scale"):
        ops.explain("adaln_modulate", x, torch.randn(1, 16))
    assert ops.adaln_modulate(x, torch.zeros(1, 16), torch.zeros(1, 16)).shape == x.shape
