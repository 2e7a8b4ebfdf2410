# SPDX-License-Identifier: Apache-2.0
"""``attention_lse`` from the statistics of npu_fusion_attention: ``max + log(sum)`` of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention import softmax_scale
from . import _fusion_attention
from .attention import dropped, refuse

__all__ = ["refuse", "run"]


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    scale = softmax_scale(q, scale)
    if mask is None:
        out, maximum, total = _fusion_attention.dense(q, k, v, scale)
        return out, _fusion_attention.log_sum_exp(maximum, total)
    drop, blind = dropped(q, k, mask)
    out, maximum, total = _fusion_attention.dense(q, k, v, scale, drop)
    lse = _fusion_attention.log_sum_exp(maximum, total).masked_fill(blind.squeeze(-1), -torch.inf)
    return out.masked_fill(blind.transpose(1, 2), 0), lse
