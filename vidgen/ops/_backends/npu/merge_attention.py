# SPDX-License-Identifier: Apache-2.0
"""``merge_attention`` by npu_ring_attention_update, which merges maxima and sums: ``(lse, 1)`` is such a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _guards
from ._fusion_attention import log_sum_exp, statistics

NAME = "npu_ring_attention_update"
UNSEEN = -1e30  # for -inf, which gives exp(-inf + inf) there; exp(UNSEEN - x) is 0 for the lse of any row


def refuse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out_a, lse_a, out_b, lse_b)):
        return f"{NAME} has no gradient"
    return _guards.available(NAME) or _guards.ring_update(out_a, lse_a)


def run(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are merged each for itself, so those of all samples are one sequence, as they lie: SBH with a batch of 1."""
    shape = out_a.shape
    parts = [part for out, lse in ((out_a, lse_a), (out_b, lse_b)) for part in (rows(out), *paired(lse))]
    out, maximum, total = torch.ops.npu.npu_ring_attention_update.default(*parts, input_layout="SBH")
    lse = log_sum_exp(maximum, total).squeeze(0).unflatten(1, shape[:2]).transpose(0, 1).contiguous()
    return out.view(shape), lse.masked_fill(lse < UNSEEN / 2, -torch.inf)


def rows(out: Tensor) -> Tensor:
    """(batch, queries, heads, head_dim) as (batch * queries, 1, heads * head_dim)."""
    return out.flatten(2).flatten(0, 1).unsqueeze(1).contiguous()


def paired(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, heads, queries) as maxima and sums (1, heads, batch * queries, 8)."""
    return statistics(lse.clamp(min=UNSEEN).transpose(0, 1).flatten(1).unsqueeze(0))
