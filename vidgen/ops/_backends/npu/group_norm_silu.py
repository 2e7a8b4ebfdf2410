# SPDX-License-Identifier: Apache-2.0
"""``group_norm_silu`` by npu_group_norm_swish, whose ``y * sigmoid(scale * y)`` is SiLU at scale 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._norm_silu import rounded_like
from . import _guards

NAMES = ("npu_group_norm_swish", "npu_group_norm_swish_grad")


def refuse(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _guards.available(*NAMES) or _guards.group_norm(x, weight, bias)


def run(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Channels come first there; channels-last volumes are copied to that and back."""
    weight, bias = affine(x, weight, bias)
    y, _, _ = torch.ops.npu.npu_group_norm_swish.default(x.contiguous(), num_groups, weight, bias, eps, 1.0)
    return rounded_like(y, x)


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    return weight, x.new_zeros(x.shape[1]) if bias is None else bias
