# SPDX-License-Identifier: Apache-2.0
"""What the hosts of all kernels share."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from ..._registry import refuse_dtype
from ._tuning import TUNING

REDUCTIONS = 32 * 1024  # bytes of a program's shared memory that are left to what kernels themselves need of it


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``: lengths of blocks."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(n: int, block: int) -> int:
    return -(-n // block)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it that of ``x``."""
    if x.device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return getattr(torch, x.device.type).device(x.device)


def stages(x: Tensor, elements: int) -> int:
    """How many steps' loads, of ``elements`` of ``x``'s dtype each, a program has in flight."""
    wanted = TUNING[x.device.type].stages
    if x.device.type != "cuda":
        return wanted
    room = shared_memory(x.device.index or 0) - REDUCTIONS
    return max(1, min(wanted, room // (elements * x.element_size())))


@functools.cache
def shared_memory(index: int) -> int:
    """Bytes that one program may have on this GPU."""
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def gpu(x: Tensor, **options: int) -> dict[str, int]:
    """``num_warps`` and ``num_stages``: options of a GPU's kernels, which triton-ascend asks not to be given."""
    return options if x.device.type == "cuda" else {}


def rounded_products(x: Tensor) -> dict[str, bool]:
    """Options of kernels whose differences of equal products must be 0: no product goes unrounded into a sum.

    The gradient of a norm over one channel is such a difference, times one over a deviation of 0.
    """
    return {"enable_fp_fusion": False} if x.device.type == "cuda" else {}


def rows_side_by_side(x: Tensor) -> Tensor:
    """``x``, or a copy of it, in which the elements of the last axis lie side by side."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def refuse_common(*args: Any) -> str | None:
    """What every kernel here says to its arguments."""
    if any(isinstance(a, Tensor) and a.numel() == 0 for a in args):
        return "a size is 0"
    return refuse_dtype(*args)
