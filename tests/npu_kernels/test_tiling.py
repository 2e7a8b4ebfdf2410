# SPDX-License-Identifier: Apache-2.0
"""The tiling functions: for any shape, number of cores and buffer size each element is covered exactly once.

They are plain C++ and are called here without a kernel; tiling.cpp counts.
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .twin import compile_library

ONCE, TOO_LARGE = 0, -1
CORES = st.integers(1, 64)
UB = st.integers(4 * 1024, 256 * 1024)
SIZES = st.sampled_from((2, 4))
FEW = st.integers(1, 5)
any_case = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tiling(built):
    return compile_library(Path(__file__).with_name("tiling.cpp"))


def test_rows(tiling):
    @any_case
    @given(st.integers(1, 70), st.integers(1, 300), CORES, st.integers(1, 400))
    def once(samples, rows, cores, most):
        assert tiling.cover_rows(samples, rows, cores, most) == ONCE
        # Where there are rows enough for it, every core gets as many runs as every other.
        if rows % cores == 0:
            assert tiling.imbalance(samples, rows, cores) == 0

    once()


@pytest.mark.parametrize("op", range(4), ids=["adaln", "gated adaln", "adaln backward", "gated adaln backward"])
def test_whole_rows(tiling, op):
    fitted = set()

    @any_case
    @given(st.tuples(SIZES, FEW, st.integers(1, 40), st.integers(1, 6000), CORES, UB))
    def once(case):
        found = tiling.cover_adaln(op, *case)
        assert found in (ONCE, TOO_LARGE)
        fitted.add(found)

    once()
    assert fitted == {ONCE, TOO_LARGE}


@pytest.mark.parametrize("backward", [False, True])
def test_pieces_of_rows(tiling, backward):
    @any_case
    @given(st.tuples(SIZES, FEW, st.integers(1, 9), st.integers(1, 3000), CORES, UB))
    def once(case):
        assert tiling.cover_gated(backward, *case) == ONCE

    once()


def test_sums(tiling):
    @any_case
    @given(st.tuples(SIZES, FEW, st.integers(1, 99), st.integers(1, 9000), CORES, UB))
    def once(case):
        assert tiling.cover_sums(*case) == ONCE

    once()


@pytest.mark.parametrize("backward", [False, True])
def test_heads(tiling, backward):
    @any_case
    @given(
        st.tuples(
            SIZES, FEW, st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.integers(1, 5), CORES, UB
        )
    )
    def once(case):
        assert tiling.cover_heads(backward, *case) in (ONCE, TOO_LARGE)

    once()
    released = (4, 1, 40, 48, 128, 4, 48, 184 * 1024)
    assert tiling.cover_heads(backward, *released) == ONCE


@pytest.mark.parametrize("inverse", [False, True])
def test_wavelet(tiling, inverse):
    @any_case
    @given(st.tuples(SIZES, FEW, FEW, FEW, st.integers(1, 30), st.integers(1, 200), st.booleans(), CORES, UB))
    def once(case):
        assert tiling.cover_haar(inverse, *case) == ONCE

    once()
