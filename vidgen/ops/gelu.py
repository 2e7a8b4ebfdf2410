# SPDX-License-Identifier: Apache-2.0
"""GELU in both of its forms (arXiv 1606.08415), for devices whose ``F.gelu`` knows only one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import describe, wide
from ._draw import SIZES, draw, strided
from ._registry import Choose, Cost, Op

SCHEMA = "gelu(Tensor x, str approximate) -> Tensor"
FORMS = ("none", "tanh")


def check(x: Tensor, approximate: str) -> None:
    if not x.is_floating_point():
        raise ValueError(f"gelu: x must be floating point, got {describe(x)}")
    if approximate not in FORMS:
        raise ValueError(f"gelu: approximate must be one of {FORMS}, got {approximate!r}")


def reference(x: Tensor, approximate: str) -> Tensor:
    y = wide(x)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
        return (0.5 * y * (1 + inner.tanh())).to(x.dtype)
    return (0.5 * y * (1 + (y * math.sqrt(0.5)).erf())).to(x.dtype)


def composite(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1), "none"),
        (new(2, 3, 17), "none"),
        (new(2, 3, 17), "tanh"),
        (new(3, 5).t(), "none"),
        (new(2, 0, 4), "tanh"),
        (new(2, 70)[:, ::2], "tanh"),
        (torch.linspace(-8, 8, 65, device=device).to(dtype)[None], "none"),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {f"1x4096x4096 {form}": lambda form=form: (draw((1, 4096, 4096), device, dtype), form) for form in FORMS}  # type: ignore[misc]


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return strided(choose, (choose((0, 1, 2, 3)), choose(SIZES)), device, dtype), choose(FORMS)


def cost(x: Tensor, *_: Any) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size())


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, composite=composite)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x * Phi(x)`` with the normal distribution's ``Phi``, or its approximation by tanh, on every device alike.

    PyTorch's own ``F.gelu`` does this too, except on npu, where it takes tanh whatever was asked for.

    Args:
        x: floating point, any shape and strides.
        approximate: ``"none"``: ``x / 2 * (1 + erf(x / sqrt(2)))``; ``"tanh"``:
            ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``. In float32 (float64 stays float64).

    Returns:
        Tensor of ``x``'s shape and dtype.

    Raises:
        ValueError: ``x`` is not floating point, or another form is asked for.
    """
    return op(x, approximate)
