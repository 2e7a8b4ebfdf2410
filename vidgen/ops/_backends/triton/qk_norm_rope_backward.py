# SPDX-License-Identifier: Apache-2.0
"""The gradient of ``qk_norm_rope`` (of q or of k) in Triton, on the tiles of :mod:`._rotation`.

A program goes through several runs and leaves one partial sum of the gradients of weight and bias in ``sums``,
(2, programs, channels) of float32: the same bits from run to run, with no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, gpu, on_device_of, refuse_common, rounded_products, rows_side_by_side, stages
from ._rotation import centred, cut, load_pair, place_of_run, rotate_pair, scaled, store_pair, table_strides
from ._tuning import TUNING
from .qk_norm_rope import NORMS, head_strides

qk_norm_rope_backward_refuses = refuse_common


@triton.jit
def load_section(
    x, source, grad, target, read, cos, sin, table, inside,
    ROTATED: tl.constexpr, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A section of x, and of the gradient of what was rotated."""
    a, b = load_pair(x, source, read, START, D, W, INTERLEAVED)
    da, db = load_pair(grad, target, read, START, D, W, INTERLEAVED)
    if ROTATED:
        da, db = rotate_pair(da, db, cos, sin, table, inside, -1, START, D, W)
    return a, b, da, db


@triton.jit
def store_section(
    out, to, read, a, b, da, db, rstd, through_mean, through_rstd,
    START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    da = rstd * (da - through_mean - a * through_rstd)
    db = rstd * (db - through_mean - b * through_rstd)
    store_pair(out, to, da, db, read, START, D, W, INTERLEAVED)


@triton.jit
def store_sum(sums, a, b, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr):
    a = tl.sum(tl.sum(a, 0), 0)[None, None, :]
    b = tl.sum(tl.sum(b, 0), 0)[None, None, :]
    everywhere = tl.full([1, 1, 1], 1, tl.int1)
    store_pair(sums, tl.zeros([1, 1, 1], tl.int32), a, b, everywhere, START, D, W, INTERLEAVED)


@triton.jit
def transform_heads_backward(
    grad, x, weight, cos, sin, grad_x, sums, tokens, rows, runs_per_group, runs, runs_per_program, heads, dim, quantity,
    eps,
    grad_batch, grad_token, grad_head, x_batch, x_token, x_head, table_batch, table_token,
    K: tl.constexpr, NORM: tl.constexpr, ROTATED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    INTERLEAVED: tl.constexpr, RUN: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    t = tl.arange(0, TOKENS)[:, None, None]
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[None, :, None]
    wa0 = tl.zeros([TOKENS, HEADS, W0], tl.float32)
    wb0 = tl.zeros([TOKENS, HEADS, W0], tl.float32)
    ba0 = tl.zeros([TOKENS, HEADS, W0], tl.float32)
    bb0 = tl.zeros([TOKENS, HEADS, W0], tl.float32)
    wa1 = tl.zeros([TOKENS, HEADS, W1], tl.float32)
    wb1 = tl.zeros([TOKENS, HEADS, W1], tl.float32)
    ba1 = tl.zeros([TOKENS, HEADS, W1], tl.float32)
    bb1 = tl.zeros([TOKENS, HEADS, W1], tl.float32)
    wa2 = tl.zeros([TOKENS, HEADS, W2], tl.float32)
    wb2 = tl.zeros([TOKENS, HEADS, W2], tl.float32)
    ba2 = tl.zeros([TOKENS, HEADS, W2], tl.float32)
    bb2 = tl.zeros([TOKENS, HEADS, W2], tl.float32)
    first = tl.program_id(1) * runs_per_program
    for i in tl.range(0, tl.minimum(runs_per_program, runs - first), num_stages=STAGES):
        token, row = place_of_run(first + i, runs_per_group, K, RUN)
        inside = (t < RUN) & (token + t < tokens)
        read = inside & (h < heads)
        here = x + batch * x_batch + token * x_token
        source = t * x_token + h * x_head
        there = grad + batch * grad_batch + row * grad_token
        target = t * grad_token + h * grad_head
        table = t * table_token
        co = cos + batch * table_batch + token * table_token
        si = sin + batch * table_batch + token * table_token
        a0, b0, da0, db0 = load_section(
            here, source, there, target, read, co, si, table, inside, ROTATED, 0, D0, W0, INTERLEAVED
        )
        if D1 > 0:
            a1, b1, da1, db1 = load_section(
                here, source, there, target, read, co, si, table, inside, ROTATED, D0, D1, W1, INTERLEAVED
            )
        if D2 > 0:
            a2, b2, da2, db2 = load_section(
                here, source, there, target, read, co, si, table, inside, ROTATED, D0 + D1, D2, W2, INTERLEAVED
            )
        if NORM == 2:
            total = tl.sum(a0 + b0, 2)
            if D1 > 0:
                total += tl.sum(a1 + b1, 2)
            if D2 > 0:
                total += tl.sum(a2 + b2, 2)
            mean = (total / dim)[:, :, None]
            a0, b0 = centred(a0, b0, mean, D0, W0)
            if D1 > 0:
                a1, b1 = centred(a1, b1, mean, D1, W1)
            if D2 > 0:
                a2, b2 = centred(a2, b2, mean, D2, W2)
        square = tl.sum(a0 * a0 + b0 * b0, 2)
        if D1 > 0:
            square += tl.sum(a1 * a1 + b1 * b1, 2)
        if D2 > 0:
            square += tl.sum(a2 * a2 + b2 * b2, 2)
        rstd = (1.0 / tl.sqrt(square / dim + eps))[:, :, None]
        a0, b0 = a0 * rstd, b0 * rstd
        wa0 += da0 * a0
        wb0 += db0 * b0
        ba0 += da0
        bb0 += db0
        if HAS_WEIGHT:
            da0, db0 = scaled(da0, db0, weight, 0, D0, W0, INTERLEAVED)
        along_one = tl.sum(da0 + db0, 2)
        along_x = tl.sum(da0 * a0 + db0 * b0, 2)
        if D1 > 0:
            a1, b1 = a1 * rstd, b1 * rstd
            wa1 += da1 * a1
            wb1 += db1 * b1
            ba1 += da1
            bb1 += db1
            if HAS_WEIGHT:
                da1, db1 = scaled(da1, db1, weight, D0, D1, W1, INTERLEAVED)
            along_one += tl.sum(da1 + db1, 2)
            along_x += tl.sum(da1 * a1 + db1 * b1, 2)
        if D2 > 0:
            a2, b2 = a2 * rstd, b2 * rstd
            wa2 += da2 * a2
            wb2 += db2 * b2
            ba2 += da2
            bb2 += db2
            if HAS_WEIGHT:
                da2, db2 = scaled(da2, db2, weight, D0 + D1, D2, W2, INTERLEAVED)
            along_one += tl.sum(da2 + db2, 2)
            along_x += tl.sum(da2 * a2 + db2 * b2, 2)
        through_rstd = (along_x / dim)[:, :, None]
        through_mean = (along_one / dim)[:, :, None]
        if NORM == 1:
            through_mean = through_mean * 0.0
        out = grad_x + (batch * tokens + token) * (heads * dim)
        to = t * (heads * dim) + h * dim
        store_section(out, to, read, a0, b0, da0, db0, rstd, through_mean, through_rstd, 0, D0, W0, INTERLEAVED)
        if D1 > 0:
            store_section(out, to, read, a1, b1, da1, db1, rstd, through_mean, through_rstd, D0, D1, W1, INTERLEAVED)
        if D2 > 0:
            store_section(
                out, to, read, a2, b2, da2, db2, rstd, through_mean, through_rstd, D0 + D1, D2, W2, INTERLEAVED
            )
    program = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    to_weight = sums + program * dim
    to_bias = to_weight + quantity
    store_sum(to_weight, wa0, wb0, 0, D0, W0, INTERLEAVED)
    store_sum(to_bias, ba0, bb0, 0, D0, W0, INTERLEAVED)
    if D1 > 0:
        store_sum(to_weight, wa1, wb1, D0, D1, W1, INTERLEAVED)
        store_sum(to_bias, ba1, bb1, D0, D1, W1, INTERLEAVED)
    if D2 > 0:
        store_sum(to_weight, wa2, wb2, D0 + D1, D2, W2, INTERLEAVED)
        store_sum(to_bias, ba2, bb2, D0 + D1, D2, W2, INTERLEAVED)


def qk_norm_rope_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = rows_side_by_side(grad), rows_side_by_side(x)
    weight = None if weight is None else weight.contiguous()
    batch, tokens, heads, dim = x.shape
    rows = grad.shape[1]
    rotated = cos is not None and sin is not None
    cos, sin = (rows_side_by_side(t) if t is not None else x for t in (cos, sin))
    if rotated and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    shape = cut(x, style if rotated else None, sections, sparse_n)
    columns, runs = blocks(heads, shape.heads_block), blocks(rows, shape.run)
    per_program = blocks(runs, max(1, TUNING[x.device.type].backward_programs // columns))
    programs = blocks(runs, per_program)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((2, batch * programs * columns, dim), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        transform_heads_backward[(columns, programs, batch)](
            grad,
            x,
            weight,
            cos,
            sin,
            grad_x,
            sums,
            tokens,
            rows,
            rows // sparse_n**2,
            runs,
            per_program,
            heads,
            dim,
            sums.stride(0),
            eps,
            *head_strides(grad),
            *head_strides(x),
            *(table_strides(cos) if rotated else (0, 0)),
            K=sparse_n,
            NORM=NORMS[norm],
            ROTATED=rotated,
            HAS_WEIGHT=weight is not None,
            **shape.constants(),
            **rounded_products(x),
            STAGES=stages(x, 2 * shape.elements),
            **gpu(x, num_warps=shape.warps),
        )
    grad_weight, grad_bias = (total.sum(0).to(x.dtype) for total in sums)
    return grad_x, grad_weight, grad_bias
