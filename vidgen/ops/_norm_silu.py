# SPDX-License-Identifier: Apache-2.0
"""What the ops that normalise ``(batch, channels, *spatial)`` and apply SiLU share."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import require_like, wide
from ._draw import draw, strided
from ._modulation import check_affine
from ._registry import Choose

# Around the blocks that kernels cut positions into, too.
SPATIAL_SIZES = (0, 1, 2, 3, 5, 8, 17, 33)


def check_volume(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(
            f"{op}: x must be floating point (batch, channels, *spatial), got {tuple(x.shape)} of {x.dtype}"
        )
    check_affine(op, x, x.shape[1], weight=weight, bias=bias)


def check_gradient(op: str, grad: Tensor, x: Tensor) -> None:
    require_like(op, "grad", grad, tuple(x.shape), x)


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of results: that of ``x`` where it is contiguous in one, else plain contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def rounded_like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the dtype and memory format that results for ``x`` have."""
    return like_format(t.to(x.dtype), x)


def like_format(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the memory format that results for ``x`` have; torch_npu's ``contiguous`` knows only the plain one."""
    if memory_format(x) == torch.contiguous_format:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def per_channel(t: Tensor, rank: int) -> Tensor:
    """``(channels)`` as ``(channels, 1, ...)``, to broadcast against ``(batch, channels, *spatial)``."""
    return wide(t).view(-1, *[1] * (rank - 2))


def silu_affine_gradients(
    grad: Tensor, normalised: Tensor, weight: Tensor | None, bias: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Through ``silu(normalised * weight + bias)``: gradients of normalised (not rounded yet), weight and bias.

    Those of weight and bias have no elements where the norm has no such parameter.
    """
    affine = normalised if weight is None else normalised * per_channel(weight, x.dim())
    affine = affine if bias is None else affine + per_channel(bias, x.dim())
    sigmoid = affine.sigmoid()
    inner = wide(grad) * sigmoid * (1 + affine * (1 - sigmoid))
    rest = (0, *range(2, x.dim()))
    grad_weight = x.new_empty(0) if weight is None else (inner * normalised).sum(rest).to(x.dtype)
    grad_bias = x.new_empty(0) if bias is None else inner.sum(rest).to(x.dtype)
    return inner if weight is None else inner * per_channel(weight, x.dim()), grad_weight, grad_bias


def volume(shape: tuple[int, ...], channels_last: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random ``(batch, channels, *spatial)`` in either memory format."""
    if not channels_last:
        return draw(shape, device, dtype)
    return draw((shape[0], *shape[2:], shape[1]), device, dtype).movedim(-1, 1)


def random_volume(choose: Choose, channels: int, device: torch.device, dtype: torch.dtype, count: int) -> list[Tensor]:
    """``count`` tensors of one random shape of rank 3 to 5, each in a layout of its own."""
    spatial = [choose(SPATIAL_SIZES[:6]) for _ in range(choose((0, 1, 2)))]
    shape = (choose((0, 1, 2, 3)), channels, *spatial, choose(SPATIAL_SIZES))

    def one() -> Tensor:
        if choose((True, False)):
            return volume(shape, True, device, dtype)
        return strided(choose, shape, device, dtype)

    return [one() for _ in range(count)]


def random_parameter(choose: Choose, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return strided(choose, (channels,), device, dtype)
