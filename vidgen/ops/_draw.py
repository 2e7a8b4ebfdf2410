# SPDX-License-Identifier: Apache-2.0
"""Tensors for samples and property tests, in the memory layouts that users pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import Choose

# 0 and 1, small, and around the widths of vector registers.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
SMALL_SIZES = (0, 1, 2, 3, 5, 8)


def draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def strided(choose: Choose, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A random tensor of ``shape`` whose memory layout is one of those that ops must take."""
    layout = choose(("contiguous", "transposed", "sliced", "offset", "expanded"))
    if layout == "transposed" and len(shape) >= 2:
        return draw((*shape[:-2], shape[-1], shape[-2]), device, dtype).transpose(-1, -2)
    if layout == "sliced":  # every other element of a larger buffer
        return draw((*shape[:-1], 2 * shape[-1]), device, dtype)[..., ::2]
    if layout == "offset":  # a chunk of a wider row, storage not starting at zero
        return draw((*shape[:-1], shape[-1] + 3), device, dtype)[..., 3:]
    if layout == "expanded" and len(shape) >= 2:
        return draw((1, *shape[1:]), device, dtype).expand(shape)
    return draw(shape, device, dtype)
