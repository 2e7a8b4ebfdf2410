# SPDX-License-Identifier: Apache-2.0
"""GroupNorm over frames that several ranks hold, with statistics in float32.

Every rank computes count, mean and sum of squared deviations of its own frames; merged as in Chan, Golub and LeVeque
(1979) they are as exact as those of a pass over all frames. All ranks merge in the same order and get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_ONCE = 2**24  # values that are widened to float32 at a time


def group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool, collect: Callable[[Tensor], Tensor]) -> Tensor:
    """``norm`` of this rank's ``x``, ``(batch, channels, frames, ...)``, over the frames of all ranks, then SiLU.

    ``collect`` stacks the ranks' tensors along a new first dimension. Returns x's dtype and memory format.
    """
    groups, channels = norm.num_groups, x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    step = max(1, AT_ONCE * x.shape[2] // x.numel())
    own = merge(torch.stack([statistics(block.to(wide), groups) for block in x.split(step, 2)]))
    count, mean, squares = merge(collect(own))
    scale = (squares / count + norm.eps).rsqrt()
    per_channel = [1] * (x.dim() - 2)
    mean, scale = (t.repeat_interleave(channels // groups, 1).view(*x.shape[:2], *per_channel) for t in (mean, scale))
    shift = torch.zeros((), dtype=wide, device=x.device)
    if norm.affine:
        scale = scale * norm.weight.to(wide).view(-1, *per_channel)
        shift = norm.bias.to(wide).view(-1, *per_channel)
    result = torch.empty_like(x)
    for block, out in zip(x.split(step, 2), result.split(step, 2), strict=True):
        y = (block.to(wide) - mean).mul_(scale).add_(shift)
        out.copy_(F.silu(y, inplace=True) if silu else y)
    return result


def statistics(x: Tensor, groups: int) -> Tensor:
    """Count, mean and sum of squared deviations of each group, ``(3, batch, groups)``."""
    values = x.unflatten(1, (groups, -1)).flatten(2)
    variance, mean = torch.var_mean(values, 2, correction=0)
    count = torch.full_like(mean, values.shape[2])
    return torch.stack((count, mean, variance * count))


def merge(parts: Tensor) -> Tensor:
    """The statistics of several parts together, ``(parts, 3, batch, groups)`` to ``(3, batch, groups)``."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (means * (counts / count)).sum(0)
    return torch.stack((count, mean, (squares + counts * (means - mean).square()).sum(0)))
