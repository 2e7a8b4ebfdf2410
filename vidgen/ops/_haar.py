# SPDX-License-Identifier: Apache-2.0
"""Haar wavelets one dimension at a time: sums and differences of neighbours. What haar_2d and haar_3d share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import describe, wide


def analyse(x: Tensor, dims: Sequence[int], filter_constant: float) -> Tensor:
    """Split ``x`` into ``2 ** len(dims)`` bands, stacked along channels; the first of ``dims`` varies slowest."""
    bands = [wide(x)]
    for dim in dims:
        bands = [half for band in bands for half in _sum_and_difference(band, dim)]
    return (torch.cat(bands, 1) * filter_constant).to(x.dtype).contiguous()


def synthesise(y: Tensor, dims: Sequence[int], filter_constant: float) -> Tensor:
    """The transpose of :func:`analyse`: its inverse, times ``filter_constant ** 2 * 2 ** len(dims)``."""
    bands = list(wide(y).chunk(2 ** len(dims), 1))
    for dim in reversed(dims):
        bands = [
            torch.stack((total + difference, total - difference), dim + 1).flatten(dim, dim + 1)
            for total, difference in zip(bands[::2], bands[1::2], strict=True)
        ]
    return (bands[0] * filter_constant).to(y.dtype).contiguous()


def _sum_and_difference(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    first, second = x.unflatten(dim, (x.shape[dim] // 2, 2)).unbind(dim + 1)
    return first + second, first - second


def require_even(op: str, x: Tensor) -> None:
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        raise ValueError(f"{op}: height and width of x must be even, got {describe(x)}")


def require_bands(op: str, y: Tensor, bands: int) -> None:
    if y.shape[1] % bands:
        raise ValueError(f"{op}: channels of y must be a multiple of {bands}, one part per band, got {describe(y)}")
