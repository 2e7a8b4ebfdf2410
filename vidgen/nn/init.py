# SPDX-License-Identifier: Apache-2.0
"""Drawing the weights of layers, all from one generator."""

from __future__ import annotations

import math

import torch
from torch import nn


def init_default(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """A linear layer, convolution or norm as PyTorch initialises it; other modules are left alone.

    Weights and biases of the first two are uniform in ``+-1 / sqrt(inputs of one output)``.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        bound = 1 / math.sqrt(module.weight[0].numel())
        nn.init.uniform_(module.weight, -bound, bound, generator=generator)
        if module.bias is not None:
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        module.reset_parameters()


def init_normal(module: nn.Linear, std: float, generator: torch.Generator | None = None) -> None:
    """Weight normal with standard deviation ``std``, bias 0."""
    nn.init.normal_(module.weight, std=std, generator=generator)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
