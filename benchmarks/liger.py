# SPDX-License-Identifier: Apache-2.0
"""Liger-Kernel as a baseline where it is installed: its RMSNorm, LayerNorm, GroupNorm and RoPE.

Where it has a part of an op only, the rest is PyTorch's, as a user of Liger would write it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from originals import Step, rows
from torch import Tensor


def step_for(op: str, args: tuple[Any, ...]) -> Step | None:
    """The call to be timed, or None where Liger has nothing to compare with or is not installed."""
    builder = BUILDERS.get(op)
    if builder is None:
        return None
    try:
        importlib.import_module("liger_kernel.ops")
    except ImportError:
        return None
    return builder(*args)


def function(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Step | None:
    if weight is None or bias is None:
        return None
    norm = function("layer_norm", "LigerLayerNormFunction")
    return lambda: norm(x, weight, bias, eps) * (1 + rows(scale)) + rows(shift)


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Step | None:
    if not x.is_contiguous():
        return None
    norm = function("group_norm", "LigerGroupNormFunction")
    return lambda: F.silu(norm(x.flatten(2), weight, bias, x.shape[1], num_groups, eps).view_as(x))


def qk_norm_rope(q: Tensor, k: Tensor, v: Any, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> Step | None:
    _, _, norm, eps, cos, sin, style, _, sparse_n = rest
    if norm != "rms" or style != "half" or sparse_n != 1 or cos is None:
        return None
    rms, rotate = function("rms_norm", "LigerRMSNormFunction"), function("rope", "LigerRopeFunction")
    tables = [t.repeat(1, 2)[None] for t in (cos, sin)]

    def run() -> list[Tensor | None]:
        normed = (rms(t, w, eps, 0.0, "llama", False) for t, w in ((q, q_weight), (k, k_weight)))
        return [*(t.transpose(1, 2) for t in rotate(*(t.transpose(1, 2) for t in normed), *tables)), None]

    return run


def rope_3d(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Any) -> Step | None:
    """Half of the heads as queries, half as keys: Liger rotates both together, in place."""
    if style != "half" or x.shape[2] % 2:
        return None
    rotate = function("rope", "LigerRopeFunction")
    tables = [t.repeat(1, 2)[None] for t in (cos, sin)]
    halves = [t.contiguous() for t in x.chunk(2, 2)]
    return lambda: rotate(*(t.transpose(1, 2) for t in halves), *tables)


BUILDERS: dict[str, Callable[..., Step | None]] = {
    "adaln_modulate": adaln_modulate,
    "group_norm_silu": group_norm_silu,
    "qk_norm_rope": qk_norm_rope,
    "rope_3d": rope_3d,
}
# Its results are not comparable: it writes into what it is given.
UNCHECKED = ("rope_3d",)
