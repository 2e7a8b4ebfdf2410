# SPDX-License-Identifier: Apache-2.0
"""``attention_backward`` by npu_fusion_attention_grad: it takes statistics, so those of all keys may be given.

``softmax_max = lse`` and ``softmax_sum = 1`` make its ``exp(S - max) / sum`` the final weights. Rows that see none of
these keys, or no key at all, get weights of 0 by a log-sum-exp far above any score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention import softmax_scale
from . import _fusion_attention, _guards
from ._fusion_attention import statistics
from .attention import dropped

NEVER = 1e30


def refuse(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> str | None:
    return _guards.available(*_fusion_attention.NAMES) or _guards.attention(q, k, v)


def run(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    lse, drop = lse.masked_fill(lse == -torch.inf, NEVER), None
    if mask is not None:
        drop, blind = dropped(q, k, mask)
        lse = lse.masked_fill(blind.squeeze(-1), NEVER)
    maximum, total = statistics(lse)
    grads = _fusion_attention.gradients(q, k, v, grad, softmax_scale(q, scale), drop, maximum, total, out)
    grad_q, grad_k, grad_v = (t.float().contiguous() for t in grads)
    return grad_q, grad_k, grad_v
