# SPDX-License-Identifier: Apache-2.0
"""Each op on its kernels: what they refuse, and the arguments as they take them.

They want rows that are contiguous, and modulations per sample; shift, scale and gate may be the strided views of one
projection that DiT blocks make. A tensor of another layout is copied first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._registry import OPS, refuse_dtype
from . import _library


@dataclass(frozen=True)
class Kernel:
    """``refuses(*args)`` has the op's own reasons; ``call(*args)`` is for arguments that have elements."""

    op: str
    call: Callable[..., Any]
    refuses: Callable[..., str | None]

    def refuse(self, *args: Any) -> str | None:
        return _library.status or refuse_dtype(*args) or self.refuses(*args)

    def run(self, *args: Any) -> Any:
        if next(a for a in args if isinstance(a, Tensor)).numel() == 0:
            return _zeros(OPS[self.op].fake(*args))  # type: ignore[misc]
        return self.call(*args)


def _zeros(results: Any) -> Any:
    """Of arguments without elements: results without elements, and sums of nothing."""
    return results.zero_() if isinstance(results, Tensor) else tuple(t.zero_() for t in results)


def _kernels() -> Any:
    return torch.ops.vidgen_ascendc


@functools.cache
def _longest_row(op: str, dtype: torch.dtype) -> int:
    """Elements of the longest row that fits a core's unified buffer."""
    return int(_kernels().longest_row(op, dtype))


def _refuse_rows(op: str, x: Tensor, *modulation: Tensor) -> str | None:
    if any(t.dim() == 3 for t in modulation):
        return "the kernel takes modulations per sample, not per token"
    if x.shape[-1] > (limit := _longest_row(op, x.dtype)):
        return f"a row of {x.shape[-1]} channels is too long for the unified buffer, which takes {limit}"
    return None


def _rows(t: Tensor) -> Tensor:
    """A modulation (batch, channels) whose rows are contiguous."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _parameter(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    args = x.contiguous(), _rows(shift), _rows(scale), _parameter(weight), _parameter(bias)
    return _kernels().adaln_modulate(*args, eps)  # type: ignore[no-any-return]


KERNELS = {
    kernel.op: kernel
    for kernel in (
        Kernel(
            "adaln_modulate",
            _adaln_modulate,
            lambda x, shift, scale, *_: _refuse_rows("adaln_modulate", x, shift, scale),
        ),
    )
}
