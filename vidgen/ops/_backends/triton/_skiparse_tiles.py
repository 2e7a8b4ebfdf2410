# SPDX-License-Identifier: Apache-2.0
"""How the kernels of Skiparse attention find the tokens of a group.

A group is a number of runs of tokens with one constant step each: with the pattern "single" one run of step k, with
"group" the k runs of step k*k that start at its first k tokens. Two ways to cut it into tiles:

    COLUMNS = 1     a tile lies within one run, and each access is a block of rows with one stride. A tile is
                    ``start`` rows into the run ``column``.
    COLUMNS = k     a tile holds the next rows of all k runs, in the order of the tokens. Two levels of strides, which
                    costs nothing where each row has an address of its own anyway (CUDA) and leaves fewer tiles half
                    empty; on Ascend it would take single accesses. A tile is ``start`` tokens into the group.

    token = group * token_group + column + start // COLUMNS * token_row      in the order of the tokens
    place = group * place_group + column + start // COLUMNS * place_row      in q, k and v
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def offsets(step, unit, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the rows of a tile: ``step`` along a run, ``unit`` from run to run."""
    r = tl.arange(0, BLOCK)
    if COLUMNS == 1:
        return r * step
    return r // COLUMNS * step + r % COLUMNS * unit


@triton.jit
def load_rows(
    start, step, unit, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_D) from ``start``; zeros behind ``rows`` and behind ``D``."""
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = start + offsets(step, unit, BLOCK, COLUMNS)[:, None] + d[None, :]
    if BOUNDED:
        return tl.load(at, mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(
    start, step, unit, rows, value, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr
):
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = start + offsets(step, unit, BLOCK, COLUMNS)[:, None] + d[None, :]
    tl.store(at, value.to(start.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])


@triton.jit
def load_column(start, step, rows, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """One number per row; zeros behind ``rows``."""
    return tl.load(start + offsets(step, 1, BLOCK, COLUMNS), mask=tl.arange(0, BLOCK) < rows, other=0.0)


@triton.jit
def store_column(start, step, rows, value, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(start + offsets(step, 1, BLOCK, COLUMNS), value, mask=tl.arange(0, BLOCK) < rows)


@triton.jit
def rows_of(tokens, first, token_row, COLUMNS: tl.constexpr):
    """How many tokens a run, or all COLUMNS of them together, has from token ``first`` on."""
    left = tl.minimum(tl.maximum(tokens % token_row - first, 0), COLUMNS)
    return tokens // token_row * COLUMNS + left


@triton.jit
def shown_rows(mask, step, rows, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Which keys of a tile are there and not hidden."""
    there = tl.arange(0, BLOCK) < rows
    if MASKED:
        return tl.load(mask + offsets(step, 1, BLOCK, COLUMNS), mask=there, other=0) != 0
    return there
