# SPDX-License-Identifier: Apache-2.0
"""The two-layer network of a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """``net.2(gelu(net.0.proj(x)))`` with tanh-GELU: ``(..., dim)`` to ``(..., dim)``.

    PyTorch evaluates GELU of bfloat16 and float16 in float32 and rounds once.
    """

    def __init__(self, dim: int, inner_dim: int, bias: bool = True) -> None:
        super().__init__()
        # The original keys count a dropout as net.1.
        self.net = nn.ModuleList([GELUProjection(dim, inner_dim, bias), nn.Identity(), nn.Linear(inner_dim, dim, bias)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class GELUProjection(nn.Module):
    def __init__(self, dim: int, inner_dim: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")
