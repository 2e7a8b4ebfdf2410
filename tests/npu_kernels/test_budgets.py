# SPDX-License-Identifier: Apache-2.0
"""What kernels take of the unified buffer: the README's table is the measured one, and limits are the real ones."""

import pytest
import torch

from . import budgets
from .battery import DTYPES, OnKernels, battery
from .twin import SOURCES

WHOLE_ROWS = ["adaln_modulate", "adaln_modulate_backward", "gated_residual_adaln", "gated_residual_adaln_backward"]


def test_the_readme_has_the_measured_table(twin):
    text = (SOURCES / "README.md").read_text()
    assert "\n".join(budgets.table(twin)) in text


@pytest.mark.parametrize("dtype", DTYPES, ids=battery.short)
@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_the_longest_row_fits_and_a_longer_one_is_refused(twin, name, dtype):
    longest = torch.ops.vidgen_ascendc.longest_row(name, dtype)
    args = budgets.modulated(name, longest, dtype)
    taken = budgets.measure(twin, name, args)
    assert 0.98 * budgets.LIMIT < taken <= budgets.LIMIT
    battery.assert_as_accurate_as_eager(OnKernels(name), args)
    longer = budgets.modulated(name, longest + 1, dtype)
    reason = OnKernels(name).kernel.refuse(*longer)
    assert reason == f"a row of {longest + 1} channels is too long for the unified buffer, which takes {longest}"
    with pytest.raises(RuntimeError, match="does not fit the unified buffer"):
        OnKernels(name).kernel.call(*longer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=battery.short)
@pytest.mark.parametrize("name", ["gated_residual", "gated_residual_backward"])
def test_rows_longer_than_a_piece(twin, name, dtype):
    args = budgets.modulated(name, 20011, dtype)
    battery.assert_as_accurate_as_eager(OnKernels(name), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=battery.short)
@pytest.mark.parametrize("name", ["qk_norm_rope", "qk_norm_rope_backward"])
@pytest.mark.parametrize("heads, dim", [(1, 128), (24, 128), (48, 64), (257, 96), (70, 72), (2, 392)])
def test_many_and_long_heads(twin, name, heads, dim, dtype):
    args = budgets.heads(name.endswith("backward"), heads, dim, dtype)
    battery.assert_as_accurate_as_eager(OnKernels(name), args)
    assert max(twin.peaks().values()) <= budgets.LIMIT


@pytest.mark.parametrize("name", ["qk_norm_rope", "qk_norm_rope_backward"])
def test_the_longest_head_fits_and_a_longer_one_is_refused(twin, name):
    longest, backward = torch.ops.vidgen_ascendc.longest_row(name, torch.bfloat16), name.endswith("backward")
    args = budgets.heads(backward, 1, longest, torch.bfloat16)
    assert 0.95 * budgets.LIMIT < budgets.measure(twin, name, args) <= budgets.LIMIT
    battery.assert_as_accurate_as_eager(OnKernels(name), args)
    longer = budgets.heads(backward, 1, longest + 2, torch.bfloat16)
    assert "is too long for the unified buffer" in OnKernels(name).kernel.refuse(*longer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=battery.short)
@pytest.mark.parametrize("height, width", [(4, 4098), (34, 254), (2, 8192), (70, 96)])
def test_wide_and_high_frames(twin, height, width, dtype):
    video = (torch.randn(1, 1, 3, height, width).to(dtype), 0.3536, True)
    battery.assert_as_accurate_as_eager(OnKernels("haar_3d"), video)
    bands = (torch.randn(1, 8, 2, height // 2, width // 2).to(dtype), 0.3536, True)
    battery.assert_as_accurate_as_eager(OnKernels("inverse_haar_3d"), bands)
    assert max(twin.peaks().values()) <= budgets.LIMIT
