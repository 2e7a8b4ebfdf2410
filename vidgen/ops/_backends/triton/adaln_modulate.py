# SPDX-License-Identifier: Apache-2.0
"""``adaln_modulate`` and its gradient in Triton."""

from __future__ import annotations

from torch import Tensor

from ._modulation import launch_backward, launch_forward, refuse_channels

adaln_modulate_refuses = refuse_channels
adaln_modulate_backward_refuses = refuse_channels


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return launch_forward(x, None, None, shift, scale, weight, bias, eps)[1]


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    found = launch_backward(None, grad, x, None, None, scale, weight, bias, eps)
    return tuple(found[name] for name in ("x", "shift", "scale", "weight", "bias"))
