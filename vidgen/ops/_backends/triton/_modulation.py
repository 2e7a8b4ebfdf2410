# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``adaln_modulate`` and ``gated_residual_adaln``: a row of channels is held whole, and a program goes
through several rows of one sample so that modulations per sample are read once.

In the forward ``x`` is normalised; where GATED, ``h = x + gate * y`` is, after rounding. Gradients that are summed over
the sequence leave one partial sum per program in ``sums``, (quantity, batch, programs, channels) of float32: the same
bits from run to run, with no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, gpu, on_device_of, power_of_2, refuse_common, rounded_products, rows_side_by_side, stages
from ._tuning import TUNING


@triton.jit
def load_row(pointer, offset, c, mask):
    return tl.load(pointer + offset + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def modulate_rows(
    x,
    gate,
    y,
    shift,
    scale,
    weight,
    bias,
    h,
    out,
    sequence,
    channels,
    eps,
    x_batch,
    x_row,
    y_batch,
    y_row,
    gate_batch,
    gate_row,
    shift_batch,
    shift_row,
    scale_batch,
    scale_row,
    GATED: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    SHIFT_PER_TOKEN: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    start = first.to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < channels
    if HAS_WEIGHT:
        w = load_row(weight, 0, c, mask)
    if HAS_BIAS:
        beta = load_row(bias, 0, c, mask)
    if GATED and not GATE_PER_TOKEN:
        g = load_row(gate, b * gate_batch, c, mask)
    if not SHIFT_PER_TOKEN:
        move = load_row(shift, b * shift_batch, c, mask)
    if not SCALE_PER_TOKEN:
        gain = 1.0 + load_row(scale, b * scale_batch, c, mask)
    for i in range(0, tl.minimum(ROWS, sequence - first)):
        r = start + i
        v = load_row(x, b * x_batch + r * x_row, c, mask)
        to = (b * sequence + r) * channels
        if GATED:
            if GATE_PER_TOKEN:
                g = load_row(gate, b * gate_batch + r * gate_row, c, mask)
            rounded = (v + g * load_row(y, b * y_batch + r * y_row, c, mask)).to(h.dtype.element_ty)
            tl.store(h + to + c, rounded, mask=mask)
            v = rounded.to(tl.float32)
        centred = tl.where(mask, v - tl.sum(v, 0) / channels, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
        z = centred * rstd
        if HAS_WEIGHT:
            z = z * w
        if HAS_BIAS:
            z = z + beta
        if SHIFT_PER_TOKEN:
            move = load_row(shift, b * shift_batch + r * shift_row, c, mask)
        if SCALE_PER_TOKEN:
            gain = 1.0 + load_row(scale, b * scale_batch + r * scale_row, c, mask)
        tl.store(out + to + c, (z * gain + move).to(out.dtype.element_ty), mask=mask)


@triton.jit
def modulate_rows_backward(
    grad_h, grad, x, gate, y, scale, weight, bias, grad_x, grad_y, grad_gate, grad_scale, sums,
    sequence, channels, rows, quantity, eps,
    grad_h_batch, grad_h_row, grad_batch, grad_row, x_batch, x_row, y_batch, y_row, gate_batch, gate_row,
    scale_batch, scale_row,
    GATED: tl.constexpr, GATE_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``sums`` holds sums over the rows: of grad; of grad times normalised; of grad times gate; and, where the scale is
    per token and so cannot be multiplied afterwards, the first two again times ``1 + scale``.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * rows
    start = first.to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < channels
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = load_row(weight, 0, c, mask)
        gain = w
    if HAS_BIAS:
        beta = load_row(bias, 0, c, mask)
    if GATED and not GATE_PER_TOKEN:
        g = load_row(gate, b * gate_batch, c, mask)
    if not SCALE_PER_TOKEN:
        gain = gain * (1.0 + load_row(scale, b * scale_batch, c, mask))
    plain = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    gated = tl.zeros([BLOCK], tl.float32)
    gained = tl.zeros([BLOCK], tl.float32)
    gained_along = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, tl.minimum(rows, sequence - first), num_stages=STAGES):
        r = start + i
        to = (b * sequence + r) * channels
        v = load_row(x, b * x_batch + r * x_row, c, mask)
        dz = load_row(grad, b * grad_batch + r * grad_row, c, mask)
        centred = tl.where(mask, v - tl.sum(v, 0) / channels, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
        normalised = centred * rstd
        plain += dz
        if SCALE_PER_TOKEN:
            affine = normalised
            if HAS_WEIGHT:
                affine = affine * w
            if HAS_BIAS:
                affine = affine + beta
            tl.store(grad_scale + to + c, (dz * affine).to(grad_scale.dtype.element_ty), mask=mask)
            dz = dz * (1.0 + load_row(scale, b * scale_batch + r * scale_row, c, mask))
            gained += dz
            gained_along += dz * normalised
        else:
            along += dz * normalised
        inner = dz * gain
        through_mean = tl.sum(inner, 0) / channels
        through_rstd = tl.sum(inner * normalised, 0) / channels
        dx = rstd * (inner - through_mean - normalised * through_rstd)
        if GATED:
            dx = dx + load_row(grad_h, b * grad_h_batch + r * grad_h_row, c, mask)
            if GATE_PER_TOKEN:
                g = load_row(gate, b * gate_batch + r * gate_row, c, mask)
            dy = dx * g
            tl.store(grad_y + to + c, dy.to(grad_y.dtype.element_ty), mask=mask)
            dg = dx * load_row(y, b * y_batch + r * y_row, c, mask)
            if GATE_PER_TOKEN:
                tl.store(grad_gate + to + c, dg.to(grad_gate.dtype.element_ty), mask=mask)
            else:
                gated += dg
        tl.store(grad_x + to + c, dx.to(grad_x.dtype.element_ty), mask=mask)
    here = sums + (b * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(here, plain, mask=mask)
    tl.store(here + quantity, along, mask=mask)
    tl.store(here + 2 * quantity, gated, mask=mask)
    if SCALE_PER_TOKEN:
        tl.store(here + 3 * quantity, gained, mask=mask)
        tl.store(here + 4 * quantity, gained_along, mask=mask)


def refuse_channels(x: Tensor, *args: Any) -> str | None:
    most = TUNING[x.device.type].max_channels
    if x.shape[-1] > most:
        return f"a program holds a whole row, of at most {most} channels, not {x.shape[-1]}"
    return refuse_common(x, *args)


def strides(t: Tensor) -> tuple[int, int]:
    """Between samples and between rows; modulation per sample has no rows."""
    return t.stride(0), t.stride(1) if t.dim() == 3 else 0


def launch_forward(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``(h, modulated)``; without a gate the first is ``x``."""
    x, shift, scale = (rows_side_by_side(t) for t in (x, shift, scale))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    gated = gate is not None and y is not None
    gate, y = (rows_side_by_side(gate), rows_side_by_side(y)) if gate is not None and y is not None else (shift, x)
    batch, sequence, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(out) if gated else x
    tuning, block = TUNING[x.device.type], power_of_2(channels)
    with on_device_of(x):
        modulate_rows[(blocks(sequence, tuning.forward_rows), batch)](
            x,
            gate,
            y,
            shift,
            scale,
            weight,
            bias,
            h,
            out,
            sequence,
            channels,
            eps,
            *strides(x),
            *strides(y),
            *strides(gate),
            *strides(shift),
            *strides(scale),
            GATED=gated,
            GATE_PER_TOKEN=gate.dim() == 3,
            SHIFT_PER_TOKEN=shift.dim() == 3,
            SCALE_PER_TOKEN=scale.dim() == 3,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ROWS=tuning.forward_rows,
            BLOCK=block,
            **gpu(x, num_warps=tuning.row_warps(block)),
        )
    return h, out


def launch_backward(
    grad_h: Tensor | None,
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> dict[str, Tensor]:
    """Gradients by the names of the arguments; those of parameters that are not there have no elements."""
    grad, x, scale = (rows_side_by_side(t) for t in (grad, x, scale))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    gated = grad_h is not None and gate is not None and y is not None
    if grad_h is not None and gate is not None and y is not None:
        grad_h, gate, y = (rows_side_by_side(t) for t in (grad_h, gate, y))
    else:
        grad_h, gate, y = grad, scale, x
    batch, sequence, channels = x.shape
    tuning, block = TUNING[x.device.type], power_of_2(channels)
    rows = blocks(sequence, tuning.backward_programs)
    programs = blocks(sequence, rows)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    grad_x = new(*x.shape)
    grad_y = new(*x.shape) if gated else grad_x
    per_token = {"scale": scale.dim() == 3, "gate": gated and gate.dim() == 3}
    whole = {name: new(*x.shape) if is_whole else grad_x for name, is_whole in per_token.items()}
    kinds = 5 if per_token["scale"] else 3
    sums = torch.empty((kinds, batch, programs, channels), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        modulate_rows_backward[(programs, batch)](
            grad_h,
            grad,
            x,
            gate,
            y,
            scale,
            weight,
            bias,
            grad_x,
            grad_y,
            whole["gate"],
            whole["scale"],
            sums,
            sequence,
            channels,
            rows,
            batch * programs * channels,
            eps,
            *strides(grad_h),
            *strides(grad),
            *strides(x),
            *strides(y),
            *strides(gate),
            *strides(scale),
            GATED=gated,
            GATE_PER_TOKEN=per_token["gate"],
            SCALE_PER_TOKEN=per_token["scale"],
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            **rounded_products(x),
            STAGES=stages(x, (4 if gated else 2) * block),
            **gpu(x, num_warps=tuning.row_warps(block)),
        )
    totals = sums.sum(2)  # (kind, batch, channels)
    plain, along = totals[:2]
    gained, gained_along = totals[3:] if per_token["scale"] else totals[:2] * (1 + scale.float())
    grad_scale = along if weight is None else along * weight.float()
    grad_scale = grad_scale if bias is None else grad_scale + plain * bias.float()
    return {
        "x": grad_x,
        "y": grad_y,
        "shift": plain.to(x.dtype, copy=True),  # results of an op share no memory
        "scale": whole["scale"] if per_token["scale"] else grad_scale.to(x.dtype, copy=True),
        "weight": new(0) if weight is None else gained_along.sum(0).to(x.dtype),
        "bias": new(0) if bias is None else gained.sum(0).to(x.dtype),
        "gate": new(0) if not gated else whole["gate"] if per_token["gate"] else totals[2].to(x.dtype, copy=True),
    }
