# SPDX-License-Identifier: Apache-2.0
"""``qk_norm_rope`` and ``rope_3d`` in Triton, on the tiles of :mod:`._rotation`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...skiparse_index import skiparse_padded_length
from ._launch import blocks, gpu, on_device_of, refuse_common, rows_side_by_side
from ._rotation import (
    Cut,
    centred,
    cut,
    load_pair,
    place_of_run,
    rotate_pair,
    scaled,
    shifted,
    store_pair,
    table_strides,
)

NORMS = {None: 0, "rms": 1, "layer": 2}

rope_3d_refuses = refuse_common
qk_norm_rope_refuses = refuse_common


@triton.jit
def finish_section(
    a, b, out, target, kept, rstd, weight, bias, cos, sin, table, inside,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATED: tl.constexpr,
    START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Scale, rotate and store one section; rows of padding are zeros."""
    if NORM > 0:
        a, b = a * rstd, b * rstd
    if HAS_WEIGHT:
        a, b = scaled(a, b, weight, START, D, W, INTERLEAVED)
    if HAS_BIAS:
        a, b = shifted(a, b, bias, START, D, W, INTERLEAVED)
    if ROTATED:
        a, b = rotate_pair(a, b, cos, sin, table, inside, 1, START, D, W)
    store_pair(out, target, tl.where(inside, a, 0.0), tl.where(inside, b, 0.0), kept, START, D, W, INTERLEAVED)


@triton.jit
def transform(
    x, source, read, out, target, kept, weight, bias, cos, sin, table, inside, dim, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATED: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One tile of q or of k, from ``x + source`` to ``out + target``."""
    a0, b0 = load_pair(x, source, read, 0, D0, W0, INTERLEAVED)
    if D1 > 0:
        a1, b1 = load_pair(x, source, read, D0, D1, W1, INTERLEAVED)
    if D2 > 0:
        a2, b2 = load_pair(x, source, read, D0 + D1, D2, W2, INTERLEAVED)
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
    rstd = 1.0
    if NORM > 0:
        square = tl.sum(a0 * a0 + b0 * b0, 2)
        if D1 > 0:
            square += tl.sum(a1 * a1 + b1 * b1, 2)
        if D2 > 0:
            square += tl.sum(a2 * a2 + b2 * b2, 2)
        rstd = (1.0 / tl.sqrt(square / dim + eps))[:, :, None]
    finish_section(
        a0, b0, out, target, kept, rstd, weight, bias, cos, sin, table, inside,
        NORM, HAS_WEIGHT, HAS_BIAS, ROTATED, 0, D0, W0, INTERLEAVED,
    )  # fmt: skip
    if D1 > 0:
        finish_section(
            a1, b1, out, target, kept, rstd, weight, bias, cos, sin, table, inside,
            NORM, HAS_WEIGHT, HAS_BIAS, ROTATED, D0, D1, W1, INTERLEAVED,
        )  # fmt: skip
    if D2 > 0:
        finish_section(
            a2, b2, out, target, kept, rstd, weight, bias, cos, sin, table, inside,
            NORM, HAS_WEIGHT, HAS_BIAS, ROTATED, D0 + D1, D2, W2, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def transform_heads(
    q, k, v, new_q, new_k, new_v, q_weight, k_weight, q_bias, k_bias, cos, sin,
    tokens, rows, runs_per_group, heads, dim, eps,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, table_batch, table_token,
    K: tl.constexpr, NORM: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr, ROTATED: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr, HAS_K_WEIGHT: tl.constexpr, HAS_Q_BIAS: tl.constexpr, HAS_K_BIAS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    INTERLEAVED: tl.constexpr, RUN: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    token, row = place_of_run(tl.program_id(1), runs_per_group, K, RUN)
    t = tl.arange(0, TOKENS)[:, None, None]
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[None, :, None]
    inside = (t < RUN) & (token + t < tokens)
    kept = (t < RUN) & (row + t < rows) & (h < heads)
    read = inside & (h < heads)
    target = t * (heads * dim) + h * dim
    table = t * table_token
    cos += b * table_batch + token * table_token
    sin += b * table_batch + token * table_token
    to = (b * rows + row) * (heads * dim)
    transform(
        q + b * q_batch + token * q_token, t * q_token + h * q_head, read, new_q + to, target, kept, q_weight, q_bias,
        cos, sin, table, inside, dim, eps,
        NORM, HAS_Q_WEIGHT, HAS_Q_BIAS, ROTATED, D0, D1, D2, W0, W1, W2, INTERLEAVED,
    )  # fmt: skip
    if HAS_K:
        transform(
            k + b * k_batch + token * k_token, t * k_token + h * k_head, read, new_k + to, target, kept, k_weight,
            k_bias, cos, sin, table, inside, dim, eps,
            NORM, HAS_K_WEIGHT, HAS_K_BIAS, ROTATED, D0, D1, D2, W0, W1, W2, INTERLEAVED,
        )  # fmt: skip
    if HAS_V:  # moved only
        transform(
            v + b * v_batch + token * v_token, t * v_token + h * v_head, read, new_v + to, target, kept, q_weight,
            q_bias, cos, sin, table, inside, dim, eps,
            0, False, False, False, D0, D1, D2, W0, W1, W2, INTERLEAVED,
        )  # fmt: skip


def grid_of(shape: Cut, batch: int, rows: int, heads: int) -> tuple[int, int, int]:
    return blocks(heads, shape.heads_block), blocks(rows, shape.run), batch


def head_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def rope_3d(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    return launch(x, None, None, None, None, None, None, None, 0.0, cos, sin, style, sections, 1)[0]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch(q, k, v, q_weight, k_weight, q_bias, k_bias, norm, eps, cos, sin, style, sections, sparse_n)


def launch(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rows_side_by_side(q), *(None if t is None else rows_side_by_side(t) for t in (k, v))
    parameters = [None if t is None else t.contiguous() for t in (q_weight, k_weight, q_bias, k_bias)]
    batch, tokens, heads, dim = q.shape
    rows = skiparse_padded_length(tokens, sparse_n)
    rotated = cos is not None and sin is not None
    cos, sin = (rows_side_by_side(t) if t is not None else q for t in (cos, sin))
    if rotated and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    shape = cut(q, style if rotated else None, sections, sparse_n)
    new_q, new_k, new_v = (
        q.new_empty(0) if t is None else torch.empty((batch, rows, heads, dim), dtype=q.dtype, device=q.device)
        for t in (q, k, v)
    )
    with on_device_of(q):
        transform_heads[grid_of(shape, batch, rows, heads)](
            q,
            q if k is None else k,
            q if v is None else v,
            new_q,
            new_k,
            new_v,
            *parameters,
            cos,
            sin,
            tokens,
            rows,
            rows // sparse_n**2,
            heads,
            dim,
            eps,
            *head_strides(q),
            *head_strides(q if k is None else k),
            *head_strides(q if v is None else v),
            *(table_strides(cos) if rotated else (0, 0)),
            K=sparse_n,
            NORM=NORMS[norm],
            HAS_K=k is not None,
            HAS_V=v is not None,
            ROTATED=rotated,
            HAS_Q_WEIGHT=parameters[0] is not None,
            HAS_K_WEIGHT=parameters[1] is not None,
            HAS_Q_BIAS=parameters[2] is not None,
            HAS_K_BIAS=parameters[3] is not None,
            **shape.constants(),
            **gpu(q, num_warps=shape.warps),
        )
    return new_q, new_k, new_v
