# SPDX-License-Identifier: Apache-2.0
"""``gated_residual_adaln`` and its gradient in Triton."""

from __future__ import annotations

from torch import Tensor

from ._modulation import launch_backward, launch_forward, refuse_channels

gated_residual_adaln_refuses = refuse_channels
gated_residual_adaln_backward_refuses = refuse_channels


def gated_residual_adaln(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, gate, y, shift, scale, weight, bias, eps)


def gated_residual_adaln_backward(
    grad_h: Tensor,
    grad_modulated: Tensor,
    h: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    found = launch_backward(grad_h, grad_modulated, h, gate, y, scale, weight, bias, eps)
    return tuple(found[name] for name in ("x", "gate", "y", "shift", "scale", "weight", "bias"))
