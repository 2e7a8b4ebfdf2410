# SPDX-License-Identifier: Apache-2.0
"""``group_norm_silu`` and its gradient in Triton.

A group is far larger than a tile. Its moments are taken tile by tile (mean and sum of squared deviations, merged after
Chan, Golub and LeVeque), so that a large mean costs no accuracy; then the tensor is read once more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, gpu, on_device_of, power_of_2, refuse_common, rounded_products
from ._volume import Volume, silu_gradient, statistics, volume

group_norm_silu_refuses = refuse_common
group_norm_silu_backward_refuses = refuse_common


@triton.jit
def moments_of_chunks(
    x, means, squares, channels, positions, steps, x_channel, x_position,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Per channel, over ``steps`` tiles: mean and sum of squared deviations, each (batch, chunks, channels)."""
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * steps * POSITIONS
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    p = tl.arange(0, POSITIONS)[None, :]
    here = x + b * channels * positions + c.to(tl.int64) * x_channel + p * x_position
    mean = tl.zeros([CHANNELS], tl.float32)
    square = tl.zeros([CHANNELS], tl.float32)
    seen = 0.0
    for i in tl.range(0, steps, num_stages=STAGES):
        place = start + i * POSITIONS
        inside = (c < channels) & (place + p < positions)
        v = tl.load(here + place * x_position, mask=inside, other=0.0).to(tl.float32)
        count = tl.maximum(tl.minimum(positions - place, POSITIONS), 0).to(tl.float32)
        tile_mean = tl.sum(v, 1) / tl.maximum(count, 1.0)
        apart = tl.where(inside, v - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        both = tl.maximum(seen + count, 1.0)
        square += tl.sum(apart * apart, 1) + delta * delta * (seen * count / both)
        mean += delta * (count / both)
        seen += count
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    to = (b * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(means + to, mean, mask=channel < channels)
    tl.store(squares + to, square, mask=channel < channels)


@triton.jit
def moments_of_groups(
    means, squares, mean, rstd, channels, positions, chunks, span, width, eps,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Merge those of the chunks of a group of ``width`` channels; the results stand at each of its channels."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * width + tl.arange(0, WIDTH)[None, :]
    mine = tl.arange(0, WIDTH)[None, :] < width
    k = tl.arange(0, CHUNKS)[:, None]
    here = b * chunks * channels + c
    total = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for i in range(0, chunks, CHUNKS):
        inside = mine & (i + k < chunks)
        count = tl.minimum(positions - (i + k) * span, span).to(tl.float32)
        total += count * tl.load(means + here + (i + k) * channels, mask=inside, other=0.0)
    whole = positions * 1.0 * width
    centre = tl.sum(tl.sum(total, 1), 0) / whole
    total = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for i in range(0, chunks, CHUNKS):
        inside = mine & (i + k < chunks)
        count = tl.minimum(positions - (i + k) * span, span).to(tl.float32)
        delta = tl.load(means + here + (i + k) * channels, mask=inside, other=0.0) - centre
        square = tl.load(squares + here + (i + k) * channels, mask=inside, other=0.0)
        total += tl.where(inside, square + count * delta * delta, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(tl.sum(total, 1), 0) / whole + eps)
    to = b * channels + c
    tl.store(mean + to, tl.zeros([1, WIDTH], tl.float32) + centre, mask=mine)
    tl.store(rstd + to, tl.zeros([1, WIDTH], tl.float32) + scale, mask=mine)


@triton.jit
def load_channels(pointer, c, mask):
    return tl.load(pointer + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise_tiles(
    x, out, mean, rstd, weight, bias, channels, positions, x_channel, x_position,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    place = tl.program_id(0).to(tl.int64) * POSITIONS
    p = tl.arange(0, POSITIONS)[None, :]
    known = c < channels
    inside = known & (place + p < positions)
    here = b * channels * positions + place * x_position + c.to(tl.int64) * x_channel + p * x_position
    z = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    z = (z - load_channels(mean + b * channels, c, known)) * load_channels(rstd + b * channels, c, known)
    if HAS_WEIGHT:
        z = z * load_channels(weight, c, known)
    if HAS_BIAS:
        z = z + load_channels(bias, c, known)
    tl.store(out + here, (z / (1.0 + tl.exp(-z))).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums(
    grad, x, mean, rstd, weight, bias, sums, channels, positions, steps, quantity, x_channel, x_position,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Per channel and chunk: sums of the gradient before SiLU, and of it times the normalised value."""
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * steps * POSITIONS
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    p = tl.arange(0, POSITIONS)[None, :]
    known = c < channels
    here = b * channels * positions + c.to(tl.int64) * x_channel + p * x_position
    centre = load_channels(mean + b * channels, c, known)
    scale = load_channels(rstd + b * channels, c, known)
    plain = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    along = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        place = start + i * POSITIONS
        inside = known & (place + p < positions)
        v = tl.load(x + here + place * x_position, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + here + place * x_position, mask=inside, other=0.0).to(tl.float32)
        normalised = (v - centre) * scale
        z = normalised
        if HAS_WEIGHT:
            z = z * load_channels(weight, c, known)
        if HAS_BIAS:
            z = z + load_channels(bias, c, known)
        inner = silu_gradient(d, z)
        plain += inner
        along += inner * normalised
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    to = sums + (b * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(to, tl.sum(plain, 1), mask=channel < channels)
    tl.store(to + quantity, tl.sum(along, 1), mask=channel < channels)


@triton.jit
def gradient_tiles(
    grad, x, mean, rstd, weight, bias, through_mean, through_rstd, grad_x, channels, positions, x_channel, x_position,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    place = tl.program_id(0).to(tl.int64) * POSITIONS
    p = tl.arange(0, POSITIONS)[None, :]
    known = c < channels
    inside = known & (place + p < positions)
    here = b * channels * positions + place * x_position + c.to(tl.int64) * x_channel + p * x_position
    scale = load_channels(rstd + b * channels, c, known)
    v = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
    normalised = (v - load_channels(mean + b * channels, c, known)) * scale
    z = normalised
    if HAS_WEIGHT:
        w = load_channels(weight, c, known)
        z = z * w
    if HAS_BIAS:
        z = z + load_channels(bias, c, known)
    inner = silu_gradient(d, z)
    if HAS_WEIGHT:
        inner = inner * w
    inner = inner - load_channels(through_mean + b * channels, c, known)
    inner = inner - normalised * load_channels(through_rstd + b * channels, c, known)
    tl.store(grad_x + here, (scale * inner).to(grad_x.dtype.element_ty), mask=inside)


def moments(v: Volume, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and one over the deviation of the group of each channel, (batch, channels) of float32."""
    means, squares = (statistics(v, v.batch, v.chunks, v.channels) for _ in range(2))
    mean, rstd = (statistics(v, v.batch, v.channels) for _ in range(2))
    moments_of_chunks[(v.chunks, blocks(v.channels, v.channels_block), v.batch)](
        v.x, means, squares, v.channels, v.positions, v.steps, v.channel_stride, v.position_stride,
        CHANNELS=v.channels_block, POSITIONS=v.positions_block, STAGES=v.stages, **gpu(v.x, num_warps=v.warps),
    )  # fmt: skip
    width = v.channels // num_groups
    wide = power_of_2(width)
    rows = min(power_of_2(v.chunks), max(1, 1024 // wide))
    moments_of_groups[(num_groups, v.batch)](
        means, squares, mean, rstd, v.channels, v.positions, v.chunks, v.positions_block * v.steps, width, eps,
        WIDTH=wide, CHUNKS=rows, **gpu(v.x, num_warps=4),
    )  # fmt: skip
    return mean, rstd


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    v = volume(x, whole_channels=False)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    out = v.like()
    with on_device_of(x):
        mean, rstd = moments(v, num_groups, eps)
        grid = (blocks(v.positions, v.positions_block), blocks(v.channels, v.channels_block), v.batch)
        normalise_tiles[grid](
            v.x, out, mean, rstd, weight, bias, v.channels, v.positions, v.channel_stride, v.position_stride,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            CHANNELS=v.channels_block, POSITIONS=v.positions_block, **gpu(x, num_warps=v.warps),
        )  # fmt: skip
    return out


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    v = volume(x, whole_channels=False)
    grad = v.alike(grad)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    grad_x = v.like()
    columns = blocks(v.channels, v.channels_block)
    constants = {
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "CHANNELS": v.channels_block,
        "POSITIONS": v.positions_block,
        **gpu(x, num_warps=v.warps),
        **rounded_products(x),
    }
    sums = statistics(v, 2, v.batch, v.chunks, v.channels)
    with on_device_of(x):
        mean, rstd = moments(v, num_groups, eps)
        gradient_sums[(v.chunks, columns, v.batch)](
            grad, v.x, mean, rstd, weight, bias, sums, v.channels, v.positions, v.steps, sums.stride(0),
            v.channel_stride, v.position_stride, STAGES=v.stages, **constants,
        )  # fmt: skip
        totals = sums.sum(2)  # (2, batch, channels)
        width = v.channels // num_groups
        within = totals if weight is None else totals * weight.float()
        within = within.unflatten(2, (num_groups, width)).sum(3) / (width * v.positions)
        through_mean, through_rstd = within.repeat_interleave(width, 2).contiguous()
        gradient_tiles[(blocks(v.positions, v.positions_block), columns, v.batch)](
            grad, v.x, mean, rstd, weight, bias, through_mean, through_rstd, grad_x, v.channels, v.positions,
            v.channel_stride, v.position_stride, **constants,
        )  # fmt: skip
    grad_bias, grad_weight = (total.sum(0).to(x.dtype) for total in totals)
    return grad_x, x.new_empty(0) if weight is None else grad_weight, x.new_empty(0) if bias is None else grad_bias
