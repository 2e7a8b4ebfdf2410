# SPDX-License-Identifier: Apache-2.0
"""``layer_norm_silu`` and its gradient in Triton: a tile holds all channels of its positions."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, gpu, on_device_of, refuse_common, rounded_products
from ._tuning import TUNING
from ._volume import silu_gradient, statistics, volume


@triton.jit
def normalised_tile(x, c, inside, channels, eps):
    """Values normalised over the channels, and one over their deviation."""
    v = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    apart = tl.where(inside, v - tl.sum(v, 0)[None, :] / channels, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(apart * apart, 0) / channels + eps)
    return apart * rstd[None, :], rstd[None, :]


@triton.jit
def normalise_positions(
    x, out, weight, bias, channels, positions, x_channel, x_position, eps,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, CHANNELS)[:, None]
    place = tl.program_id(0).to(tl.int64) * POSITIONS
    p = tl.arange(0, POSITIONS)[None, :]
    inside = (c < channels) & (place + p < positions)
    here = b * channels * positions + place * x_position + c.to(tl.int64) * x_channel + p * x_position
    z, _ = normalised_tile(x + here, c, inside, channels, eps)
    z = z * tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    z = z + tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(out + here, (z / (1.0 + tl.exp(-z))).to(out.dtype.element_ty), mask=inside)


@triton.jit
def normalise_positions_backward(
    grad, x, weight, bias, grad_x, sums, channels, positions, steps, quantity, x_channel, x_position, eps,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Leaves one partial sum of the gradients of bias and weight, (2, batch, chunks, channels) of float32."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * steps * POSITIONS
    c = tl.arange(0, CHANNELS)[:, None]
    p = tl.arange(0, POSITIONS)[None, :]
    w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    beta = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    sum_bias = tl.zeros([CHANNELS], tl.float32)
    sum_weight = tl.zeros([CHANNELS], tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        place = start + i * POSITIONS
        inside = (c < channels) & (place + p < positions)
        here = b * channels * positions + place * x_position + c.to(tl.int64) * x_channel + p * x_position
        normalised, rstd = normalised_tile(x + here, c, inside, channels, eps)
        d = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
        inner = silu_gradient(d, normalised * w + beta)
        sum_bias += tl.sum(inner, 1)
        sum_weight += tl.sum(inner * normalised, 1)
        inner = inner * w
        through_mean = tl.sum(inner, 0)[None, :] / channels
        through_rstd = tl.sum(inner * normalised, 0)[None, :] / channels
        dx = rstd * (inner - through_mean - normalised * through_rstd)
        tl.store(grad_x + here, dx.to(grad_x.dtype.element_ty), mask=inside)
    channel = tl.arange(0, CHANNELS)
    to = sums + (b * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(to, sum_bias, mask=channel < channels)
    tl.store(to + quantity, sum_weight, mask=channel < channels)


def layer_norm_silu_refuses(x: Tensor, *args: Any) -> str | None:
    most = TUNING[x.device.type].max_channels // 16
    if x.shape[1] > most:
        return f"a program holds all channels of its positions, at most {most}, not {x.shape[1]}"
    return refuse_common(x, *args)


def layer_norm_silu_backward_refuses(grad: Tensor, x: Tensor, *args: Any) -> str | None:
    return layer_norm_silu_refuses(x, *args)


def layer_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    v = volume(x, whole_channels=True)
    out = v.like()
    with on_device_of(x):
        normalise_positions[(blocks(v.positions, v.positions_block), v.batch)](
            v.x, out, weight.contiguous(), bias.contiguous(), v.channels, v.positions, v.channel_stride,
            v.position_stride, eps, CHANNELS=v.channels_block, POSITIONS=v.positions_block, **gpu(x, num_warps=v.warps),
        )  # fmt: skip
    return out


def layer_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    v = volume(x, whole_channels=True)
    grad, grad_x = v.alike(grad), v.like()
    sums = statistics(v, 2, v.batch, v.chunks, v.channels)
    with on_device_of(x):
        normalise_positions_backward[(v.chunks, v.batch)](
            grad, v.x, weight.contiguous(), bias.contiguous(), grad_x, sums, v.channels, v.positions, v.steps,
            sums.stride(0), v.channel_stride, v.position_stride, eps,
            CHANNELS=v.channels_block, POSITIONS=v.positions_block, STAGES=v.stages, **gpu(x, num_warps=v.warps),
            **rounded_products(x),
        )  # fmt: skip
    grad_bias, grad_weight = (total.sum((0, 1)).to(x.dtype) for total in sums)
    return grad_x, grad_weight, grad_bias
