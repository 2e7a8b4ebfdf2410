# SPDX-License-Identifier: Apache-2.0
"""Latents as sequences of flattened patches. A grid is the number of patches along frames, rows and columns."""

from __future__ import annotations

from torch import Tensor

Grid = tuple[int, int, int]


def patch_grid(latent: Tensor, patch: Grid) -> Grid:
    """Patches along frames, height and width of ``(B, C, T, H, W)``."""
    frames, rows, columns = (size // p for size, p in zip(latent.shape[2:], patch, strict=True))
    return frames, rows, columns


def cut_patches(latent: Tensor, patch: Grid) -> Tensor:
    """``(B, C, T, H, W)`` to ``(B, N, C t p p)``; within a patch the order is channel, frame, row, column."""
    x = latent
    for axis in (4, 3, 2):
        x = x.unflatten(axis, (-1, patch[axis - 2]))  # in the end B, C, T, t, H, p, W, p
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def join_patches(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """The inverse of :func:`cut_patches`, contiguous."""
    x = tokens.unflatten(2, (-1, *patch)).unflatten(1, grid)  # B, T, H, W, C, t, p, p
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(x.shape[0], x.shape[1], *(g * p for g, p in zip(grid, patch, strict=True)))
