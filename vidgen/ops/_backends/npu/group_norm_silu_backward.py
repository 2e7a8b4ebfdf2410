# SPDX-License-Identifier: Apache-2.0
"""The gradient of ``group_norm_silu`` by npu_group_norm_swish_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._norm_silu import rounded_like
from . import _guards
from .group_norm_silu import NAMES, affine


def refuse(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    return _guards.available(*NAMES) or _guards.group_norm_backward(x, num_groups, weight, bias)


def run(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32: the statistics have the dtype of x there, and a mean of 8 bits is no mean to subtract."""
    wide_x, wide_grad = x.contiguous().float(), grad.contiguous().float()
    gamma, beta = (t.float() for t in affine(x, weight, bias))
    swish = torch.ops.npu.npu_group_norm_swish.default
    _, mean, rstd = swish(wide_x, num_groups, gamma, beta, eps, 1.0)
    needed = [True, weight is not None, bias is not None]
    grad_x, *grads = torch.ops.npu.npu_group_norm_swish_grad.default(
        wide_grad, wide_x, num_groups, gamma, beta, mean, rstd, needed, 1.0
    )
    parameters = (g.to(x.dtype) if wanted else x.new_empty(0) for g, wanted in zip(grads, needed[1:], strict=True))
    grad_weight, grad_bias = parameters
    return rounded_like(grad_x, x), grad_weight, grad_bias
