# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own CUDA kernels, where an op wants more of them than the public functions return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._registry import OPS, Backend
from ...attention import softmax_scale


def attention_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """FlashAttention, which keeps the log-sum-exp in float32 whatever the dtype of the rest."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, scale=softmax_scale(q, scale))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def attention_lse_refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> str | None:
    if mask is not None:
        return "it takes no mask"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it takes bfloat16 and float16 only"
    if 0 in (*q.shape, *k.shape):
        return "a size is 0"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head_dim must be a multiple of 8 of at most 256, not {q.shape[-1]}"
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return "head_dim must have stride 1"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    return None


def register(device: str) -> None:
    OPS["attention_lse"].add_backend(device, Backend("flash_cuda", attention_lse, attention_lse_refuses))
