# SPDX-License-Identifier: Apache-2.0
"""The table of what each kernel takes of a core's unified buffer, at the sizes of the released models.

``python -m tests.npu_kernels.budgets`` prints it for npu_kernels/README.md; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .battery import OnKernels
from .twin import Twin

LIMIT = 184 * 1024
CHANNELS = (1152, 1920, 2304, 3072)
HEADS = ((24, 96), (24, 128), (48, 64))
FRAMES = ((256, 256), (352, 640), (576, 1024))


def rows(count: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, 1, channels, dtype=dtype) for _ in range(count)]


def modulations(count: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, channels, dtype=dtype) for _ in range(count)]


def modulated(name: str, channels: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of an op on one token, with an affine norm."""
    x, y, grad, other = rows(4, channels, dtype)
    gate, shift, scale = modulations(3, channels, dtype)
    norm = (torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), 1e-6)
    arguments: dict[str, tuple[Any, ...]] = {
        "adaln_modulate": (x, shift, scale, *norm),
        "adaln_modulate_backward": (grad, x, scale, *norm),
        "gated_residual": (x, gate, y),
        "gated_residual_backward": (grad, gate, y),
        "gated_residual_adaln": (x, gate, y, shift, scale, *norm),
        "gated_residual_adaln_backward": (grad, other, x, gate, y, scale, *norm),
    }
    return arguments[name]


def heads(backward: bool, heads: int, dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k = (torch.randn(1, 1, heads, dim, dtype=dtype) for _ in range(2))
    weight, cos, sin = torch.ones(dim, dtype=dtype), *torch.randn(2, 1, dim // 2).unbind()
    rotation = ("rms", 1e-6, cos, sin, "half", None, 1)
    return (q, k, weight, *rotation) if backward else (q, k, None, weight, weight, None, None, *rotation)


def cases() -> Iterator[tuple[str, str, Any]]:
    """(op, size in words, dtype -> arguments)."""
    for name in (
        "adaln_modulate",
        "adaln_modulate_backward",
        "gated_residual",
        "gated_residual_backward",
        "gated_residual_adaln",
        "gated_residual_adaln_backward",
    ):
        for channels in CHANNELS:
            yield name, f"{channels} channels", lambda dtype, n=name, c=channels: modulated(n, c, dtype)
    for backward in (False, True):
        for count, dim in HEADS:
            name = "qk_norm_rope_backward" if backward else "qk_norm_rope"
            yield name, f"{count} x {dim}", lambda dtype, b=backward, h=count, d=dim: heads(b, h, d, dtype)
    for height, width in FRAMES:
        shape = (1, 1, 1, height // 2, width // 2)
        video = (1, 1, 1, height, width)
        yield "haar_3d", f"{height} x {width}", lambda dtype, s=video: (torch.randn(s).to(dtype), 0.3536, True)
        wide = (1, 8, *shape[2:])
        yield "inverse_haar_3d", f"{height} x {width}", lambda dtype, s=wide: (torch.randn(s).to(dtype), 0.3536, True)


def measure(twin: Twin, name: str, args: Any) -> int | None:
    """Most bytes that a launch of the op's own kernel took; None where the op refuses."""
    twin.peaks()
    op = OnKernels(name)
    if op.kernel.refuse(*args) is not None:
        return None
    op(*args)
    return max(taken for kernel, taken in twin.peaks().items() if kernel.rpartition("_")[0] == name)


def table(twin: Twin) -> list[str]:
    lines = ["| kernel | size | float32 | bfloat16, float16 |", "|---|---|---|---|"]
    for name, size, arguments in cases():
        taken = [measure(twin, name, arguments(dtype)) for dtype in (torch.float32, torch.bfloat16)]
        cells = ["refused" if n is None else f"{n / 1024:.1f}" for n in taken]
        lines.append(f"| `{name}` | {size} | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(Twin())))
