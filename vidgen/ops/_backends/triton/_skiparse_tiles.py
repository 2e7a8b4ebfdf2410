# SPDX-License-Identifier: Apache-2.0
"""How the kernels of Skiparse attention find the tokens of a group.

A group is ``columns`` runs of tokens with one constant step each: with the pattern "single" one run of step k, with
"group" the k runs of step k*k that start at its first k tokens. The order in which a group's keys are visited does not
matter, so a tile never crosses runs, and each access is a block of rows with one stride. Nothing is gathered.

    token(group, column, row) = group * TOKEN_GROUP + column + row * TOKEN_ROW      in the order of the tokens
    place(group, column, row) = group * place_group + column + row * place_row      in q, k and v
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(start, step, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """(BLOCK, BLOCK_D) from ``start``, a row each ``step`` elements; zeros behind ``rows`` and behind ``D``."""
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = start + r[:, None] * step + d[None, :]
    if BOUNDED:
        return tl.load(at, mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(start, step, rows, value, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    at = start + r[:, None] * step + d[None, :]
    tl.store(at, value.to(start.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])


@triton.jit
def load_column(start, step, rows, other, BLOCK: tl.constexpr):
    """One number per row."""
    r = tl.arange(0, BLOCK)
    return tl.load(start + r * step, mask=r < rows, other=other)


@triton.jit
def store_column(start, step, rows, value, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    tl.store(start + r * step, value, mask=r < rows)


@triton.jit
def rows_of(tokens, first, token_row):
    """How many of the tokens first, first + token_row, ... there are."""
    return (tokens - first + token_row - 1) // token_row


@triton.jit
def shown_rows(mask, step, rows, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Which keys of a tile are there and not hidden."""
    r = tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(mask + r * step, mask=r < rows, other=0) != 0
    return r < rows
