# SPDX-License-Identifier: Apache-2.0
"""``qk_norm_rope`` by npu_rms_norm or PyTorch's layer_norm, then npu_rotary_mul, all in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...qk_norm_rope import group_layout
from . import _guards, rope_3d

RMS = ("npu_rms_norm", "npu_rms_norm_backward")


def refuse(
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
) -> str | None:
    return limits(q, q_weight, norm, cos, style)


def limits(x: Tensor, weight: Tensor | None, norm: str, cos: Tensor | None, style: str) -> str | None:
    names = (*(RMS if norm == "rms" else ()), *(() if cos is None else (rope_3d.NAME,)))
    return _guards.available(*names) or _guards.first(
        (_guards.rms_norm(x, weight), None if cos is None else rope_3d.limits(x, cos, style))
    )


def run(
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
    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = normalised(x.float(), weight, bias, norm, eps)
        y = y if cos is None or sin is None else rope_3d.rotated(y, cos, sin, style, sections)
        return group_layout(y.to(x.dtype), sparse_n).contiguous()

    # Without a group layout to write, there is no v; a clone where v is a view of what came in.
    new_v = q.new_empty(0) if v is None else group_layout(v, sparse_n).clone(memory_format=torch.contiguous_format)
    return one(q, q_weight, q_bias), one(k, k_weight, k_bias), new_v


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.ops.npu.npu_rms_norm.default(x, ones(x) if weight is None else weight, eps)[0]


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-1], dtype=torch.float32, device=x.device)
