# SPDX-License-Identifier: Apache-2.0
"""What the checks of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(t: Tensor) -> str:
    """Shape and dtype, for error messages."""
    return f"{tuple(t.shape)} of {t.dtype}"


def wide(t: Tensor) -> Tensor:
    """The dtype that references compute in: float32, or float64 where that came in."""
    return t if t.dtype == torch.float64 else t.float()


def require_floating(op: str, name: str, t: Tensor, rank: int, layout: str) -> None:
    if t.dim() != rank or not t.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point {layout}, got {describe(t)}")


def require_like(op: str, name: str, t: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """``t`` must have ``shape`` and share dtype and device with ``x``."""
    if tuple(t.shape) != shape or t.dtype != x.dtype:
        raise ValueError(f"{op}: {name} must be {shape} of {x.dtype}, got {describe(t)}")
    require_device(op, name, t, x)


def require_device(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{op}: {name} is on {t.device} but x is on {x.device}")
