# SPDX-License-Identifier: Apache-2.0
"""``gelu`` by npu_gelu, which has both forms and a gradient. ``F.gelu`` is always the tanh form on npu."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _guards

NAMES = ("npu_gelu", "npu_gelu_backward")


def refuse(x: Tensor, approximate: str) -> str | None:
    return _guards.available(*NAMES) or _guards.gelu(x)


def run(x: Tensor, approximate: str) -> Tensor:
    return torch.ops.npu.npu_gelu.default(x, approximate=approximate)
