# SPDX-License-Identifier: Apache-2.0
"""Rotary tables of the four systems: against the formulas of their code, and their refusals."""

import math

import pytest
import torch

from vidgen import ops


def test_angles_of_one_token():
    """Open-Sora Plan 1.5, head_dim 16: token (2, 1, 3) of a (3, 2, 4) grid."""
    cos, sin = ops.rope_3d_table((3, 2, 4), (4, 6, 6))
    assert cos.shape == sin.shape == (24, 8) and cos.dtype == torch.float32
    row = 2 * 8 + 1 * 4 + 3
    angles = [n * 10000 ** (-2 * i / d) for n, d in ((2, 4), (1, 6), (3, 6)) for i in range(d // 2)]
    torch.testing.assert_close(cos[row], torch.tensor([math.cos(a) for a in angles]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[row], torch.tensor([math.sin(a) for a in angles]), atol=1e-6, rtol=0)


def test_start_scale_and_positions_say_the_same():
    shifted = ops.rope_3d_table((2, 3, 4), (4, 6, 6), start=(1, 0, 2), scale=(2.0, 1.5, 0.5))
    spelled = [(torch.arange(n) + s) / z for n, s, z in zip((2, 3, 4), (1, 0, 2), (2.0, 1.5, 0.5), strict=True)]
    for a, b in zip(shifted, ops.rope_3d_table(spelled, (4, 6, 6)), strict=True):
        assert torch.equal(a, b)


def test_a_cropped_grid_is_a_slice_of_the_whole():
    whole, _ = ops.rope_3d_table((2, 5, 6), (4, 6, 6))
    crop, _ = ops.rope_3d_table((2, torch.arange(1, 4), torch.arange(2, 6)), (4, 6, 6))
    assert torch.equal(crop.view(2, 3, 4, 8), whole.view(2, 5, 6, 8)[:, 1:4, 2:6])


def test_text_in_front_is_not_rotated():
    cos, sin = ops.rope_3d_table((1, 2, 2), (2, 2, 2), text_tokens=3)
    x = torch.randn(1, 7, 2, 6)
    y = ops.rope_3d(x, cos, sin, style="half")
    assert torch.equal(y[:, :3], x[:, :3]) and not torch.equal(y[:, 4:], x[:, 4:])


@pytest.mark.parametrize("style, first", [("half_per_axis", [0, 1, 4, 5, 6, 10, 11, 12]), ("half", range(8)),
                                          ("interleaved", range(0, 16, 2))])  # fmt: skip
def test_which_channels_are_a_pair(style, first):
    """A quarter turn takes the first channel of each pair to the second, and the second to minus the first."""
    second = {"half_per_axis": [2, 3, 7, 8, 9, 13, 14, 15], "half": range(8, 16), "interleaved": range(1, 16, 2)}[style]
    x = torch.randn(1, 1, 1, 16)
    y = ops.rope_3d(x, torch.zeros(1, 8), torch.ones(1, 8), style=style,
                    sections=(4, 6, 6) if style == "half_per_axis" else None)  # fmt: skip
    expected = torch.empty(16)
    expected[list(second)], expected[list(first)] = x[0, 0, 0, list(first)], -x[0, 0, 0, list(second)]
    assert torch.equal(y[0, 0, 0], expected)


@pytest.mark.parametrize(
    "grid, sections, options, words",
    [
        ((2, 3), (4, 6, 6), {}, "grid must have one entry"),
        ((2, 3, 4), (3, 6, 7), {}, "sections must be even"),
        ((2, 3, 4), (4, 6, 6), {"scale": (1.0, 0.0, 1.0)}, "scale must not be 0"),
        ((2, torch.zeros(2, 2), 4), (4, 6, 6), {}, "positions must be 1-D"),
        ((2, 3, 4), (4, 6, 6), {"dtype": torch.bfloat16}, "dtype must be float32 or float64"),
    ],
)
def test_table_refuses(grid, sections, options, words):
    with pytest.raises(ValueError, match=words):
        ops.rope_3d_table(grid, sections, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"style": "quarter"}, "style must be one of"),
        ({"style": "half_per_axis"}, "sections go with style"),
        ({"style": "half", "sections": (4, 6, 6)}, "sections go with style"),
        ({"style": "half_per_axis", "sections": (4, 6, 4)}, "add up to head_dim=16"),
    ],
)
def test_rope_3d_refuses(options, words):
    cos, sin = ops.rope_3d_table((1, 1, 2), (4, 6, 6))
    with pytest.raises(ValueError, match=words):
        ops.rope_3d(torch.zeros(1, 2, 1, 16), cos, sin, **options)
    with pytest.raises(ValueError, match=r"cos must be \(3, 8\)"):
        ops.rope_3d(torch.zeros(1, 3, 1, 16), cos, sin, style="half")


def test_qk_norm_rope_hands_v_through_where_it_does_not_move():
    q, k, v = (torch.randn(1, 2, 1, 16) for _ in range(3))
    assert len(ops.qk_norm_rope(q, k, q_weight=None, k_weight=None)) == 2
    assert ops.qk_norm_rope(q, k, v, q_weight=None, k_weight=None)[2] is v
    with pytest.raises(ValueError, match="norm 'rms' has no bias"):
        ops.qk_norm_rope(q, k, q_weight=None, k_weight=None, q_bias=torch.zeros(16))
