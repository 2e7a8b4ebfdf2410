# SPDX-License-Identifier: Apache-2.0
"""The gradient of ``qk_norm_rope``: rotated back, then through the norm, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...qk_norm_rope import token_layout
from . import rope_3d
from .qk_norm_rope import limits, ones


def refuse(
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
) -> str | None:
    return limits(x, weight, norm, cos, style)


def run(
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
    inner = token_layout(grad, x.shape[1], sparse_n).float()
    if cos is not None and sin is not None:
        inner = rope_3d.rotated(inner, cos, -sin, style, sections)
    gamma = ones(x) if weight is None else weight.float()
    through = through_layer_norm if norm == "layer" else through_rms_norm
    grad_x, grad_weight, grad_bias = through(inner, x.float(), gamma, eps)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(x.dtype), grad_bias.to(x.dtype)


def through_rms_norm(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _, rstd = torch.ops.npu.npu_rms_norm.default(x, weight, eps)
    grad_x, grad_weight = torch.ops.npu.npu_rms_norm_backward.default(grad, x, weight, rstd)
    return grad_x, grad_weight, grad.sum((0, 1, 2))


def through_layer_norm(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    shape, bias = [x.shape[-1]], torch.zeros_like(weight)
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x.contiguous(), shape, mean, rstd, weight, bias, [True, True, True]
    )
