# SPDX-License-Identifier: Apache-2.0
"""Norms whose shift, scale and gate come from a conditioning vector (adaLN, DiT, arXiv 2212.09748)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops

Norm = nn.LayerNorm | nn.RMSNorm


def make_norm(kind: str, dim: int, eps: float) -> Norm:
    """Affine norm over the last axis: ``layer_norm`` or ``rms_norm``."""
    if kind not in ("layer_norm", "rms_norm"):
        raise ValueError(f"make_norm: kind must be 'layer_norm' or 'rms_norm', got {kind!r}")
    return nn.LayerNorm(dim, eps=eps) if kind == "layer_norm" else nn.RMSNorm(dim, eps=eps)


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 (float64 stays float64), whatever dtype its weights and input have.

    Modulations act on every token of a sample, so that a rounded one is an error of the whole sample.
    """

    def forward(self, x: Tensor) -> Tensor:
        return wide_linear(x, self.weight, self.bias)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


class AdaNorm(nn.Module):
    """A norm for video, one for text where wanted, and the linear layer that turns a condition into modulations."""

    def __init__(
        self, condition_dim: int, dim: int, num_chunks: int, kind: str, eps: float, *, text: bool = False
    ) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = WideLinear(condition_dim, num_chunks * dim)
        self.norm = make_norm(kind, dim, eps)
        self.norm_enc: Any = make_norm(kind, dim, eps) if text else None

    def forward(self, condition: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """``(batch, condition_dim)`` to ``num_chunks`` modulations ``(batch, dim)``, views of one tensor."""
        return self.linear(condition).to(dtype).chunk(self.num_chunks, dim=-1)


def modulate(norm: Norm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` with x ``(batch, sequence, channels)`` and the others ``(batch, channels)``."""
    if isinstance(norm, nn.LayerNorm):
        return ops.adaln_modulate(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(shift[:, None].to(wide), norm(x).to(wide), 1 + scale[:, None].to(wide)).to(x.dtype)


def residual_modulate(
    norm: Norm, x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``h = x + gate * y`` and ``modulate(norm, h, shift, scale)``, both, in one pass where there is an op for it."""
    if isinstance(norm, nn.LayerNorm):
        return ops.gated_residual_adaln(x, gate, y, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    h = ops.gated_residual(x, gate, y)
    return h, modulate(norm, h, shift, scale)
