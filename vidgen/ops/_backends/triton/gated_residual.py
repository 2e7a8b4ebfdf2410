# SPDX-License-Identifier: Apache-2.0
"""``gated_residual`` and its gradient in Triton; partial sums as in :mod:`._modulation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, gpu, on_device_of, power_of_2, refuse_common, rows_side_by_side
from ._modulation import strides
from ._tuning import TUNING

gated_residual_refuses = refuse_common
gated_residual_backward_refuses = refuse_common


@triton.jit
def gate_rows(
    x,
    gate,
    y,
    out,
    sequence,
    channels,
    x_batch,
    x_row,
    y_batch,
    y_row,
    gate_batch,
    gate_row,
    GATE_PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    first = (tl.program_id(1) * ROWS).to(tl.int64)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (first + r < sequence) & (c < channels)
    v = tl.load(x + b * x_batch + first * x_row + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(y + b * y_batch + first * y_row + r * y_row + c, mask=mask, other=0.0).to(tl.float32)
    if GATE_PER_TOKEN:
        g = tl.load(gate + b * gate_batch + first * gate_row + r * gate_row + c, mask=mask, other=0.0).to(tl.float32)
    else:
        g = tl.load(gate + b * gate_batch + c, mask=c < channels, other=0.0).to(tl.float32)
    to = out + (b * sequence + first) * channels + r * channels + c
    tl.store(to, (v + g * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_rows_backward(
    grad,
    gate,
    y,
    grad_gate,
    grad_y,
    sums,
    sequence,
    channels,
    rows,
    grad_batch,
    grad_row,
    y_batch,
    y_row,
    gate_batch,
    gate_row,
    GATE_PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    start = (tl.program_id(1) * rows).to(tl.int64)
    length = tl.minimum(rows, sequence - tl.program_id(1) * rows)
    row = tl.arange(0, ROWS)[:, None]
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if not GATE_PER_TOKEN:
        g = tl.load(gate + b * gate_batch + c, mask=c < channels, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, length, ROWS):
        mask = (i + row < length) & (c < channels)
        r = start + i
        d = tl.load(grad + b * grad_batch + r * grad_row + row * grad_row + c, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(y + b * y_batch + r * y_row + row * y_row + c, mask=mask, other=0.0).to(tl.float32)
        to = (b * sequence + r) * channels + row * channels + c
        if GATE_PER_TOKEN:
            g = tl.load(gate + b * gate_batch + r * gate_row + row * gate_row + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_gate + to, (d * u).to(grad_gate.dtype.element_ty), mask=mask)
        else:
            total += d * u
        tl.store(grad_y + to, (d * g).to(grad_y.dtype.element_ty), mask=mask)
    if not GATE_PER_TOKEN:
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = sums + (b * tl.num_programs(1) + tl.program_id(1)) * channels + column
        tl.store(here, tl.sum(total, 0), mask=column < channels)


def cut(x: Tensor) -> tuple[int, int]:
    """Rows and channels of a block."""
    tile = TUNING[x.device.type].tile
    block = min(power_of_2(x.shape[-1]), tile // 4)
    return tile // block if block < tile // 4 else 4, block


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    x, gate, y = (rows_side_by_side(t) for t in (x, gate, y))
    batch, sequence, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, block = cut(x)
    with on_device_of(x):
        gate_rows[(blocks(channels, block), blocks(sequence, rows), batch)](
            x,
            gate,
            y,
            out,
            sequence,
            channels,
            *strides(x),
            *strides(y),
            *strides(gate),
            GATE_PER_TOKEN=gate.dim() == 3,
            ROWS=rows,
            BLOCK=block,
            **gpu(x, num_warps=TUNING[x.device.type].warps(rows * block)),
        )
    return out


def gated_residual_backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, y = (rows_side_by_side(t) for t in (grad, gate, y))
    batch, sequence, channels = y.shape
    tuning = TUNING[y.device.type]
    rows, block = cut(y)
    columns = blocks(channels, block)
    per_program = max(rows, blocks(sequence, max(1, tuning.backward_programs // columns)))
    programs = blocks(sequence, per_program)
    per_token = gate.dim() == 3
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    grad_gate = torch.empty_like(grad_y) if per_token else grad_y
    sums = torch.empty((batch, programs, channels), dtype=torch.float32, device=y.device)
    with on_device_of(y):
        gate_rows_backward[(columns, programs, batch)](
            grad,
            gate,
            y,
            grad_gate,
            grad_y,
            sums,
            sequence,
            channels,
            per_program,
            *strides(grad),
            *strides(y),
            *strides(gate),
            GATE_PER_TOKEN=per_token,
            ROWS=rows,
            BLOCK=block,
            **gpu(y, num_warps=tuning.warps(rows * block)),
        )
    return grad_gate if per_token else sums.sum(1).to(y.dtype), grad_y
