# SPDX-License-Identifier: Apache-2.0
"""Videos as sequences of flattened patches, and the positions of those patches (Flux, Open-Sora 2.0)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_patches(latent: Tensor, patch_size: int) -> Tensor:
    """``(B, C, T, p h, p w)`` to ``(B, T h w, C p p)``.

    Tokens run over frames, then rows, then columns; within a token the order is channel, row, column.

    Raises:
        ValueError: ``latent`` is not 5-D, or its height or width is no multiple of the patch size.
    """
    if latent.dim() != 5 or patch_size < 1 or any(size % patch_size for size in latent.shape[3:]):
        raise ValueError(
            "pack_patches: latent must be (batch, channels, frames, height, width) with height and width multiples of "
            f"patch_size={patch_size}, got {tuple(latent.shape)}"
        )
    x = latent.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))  # B, C, T, h, p, w, p
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpack_patches(tokens: Tensor, grid: Sequence[int], patch_size: int) -> Tensor:
    """The inverse of :func:`pack_patches`.

    Args:
        tokens: ``(B, T h w, C p p)``.
        grid: ``(T, h, w)``, the number of tokens along frames, rows and columns.
        patch_size: p.

    Returns:
        ``(B, C, T, p h, p w)``, contiguous.

    Raises:
        ValueError: the grid or the patch size does not fit.
    """
    p = patch_size
    if tokens.dim() != 3 or len(grid) != 3 or tokens.shape[1] != grid[0] * grid[1] * grid[2] or tokens.shape[2] % p**2:
        raise ValueError(
            f"unpack_patches: tokens must be (batch, tokens, channels * {p} * {p}) with the tokens of grid "
            f"{tuple(grid)}, got {tuple(tokens.shape)}"
        )
    frames, rows, columns = grid
    x = tokens.unflatten(2, (-1, p, p)).unflatten(1, (frames, rows, columns))  # B, T, h, w, C, p, p
    return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(tokens.shape[0], -1, frames, rows * p, columns * p)


def patch_positions(
    grid: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """``(T h w, 3)``: frame, row and column of every token of a grid ``(T, h, w)``, counted from 0."""
    axes = [torch.arange(count, device=device) for count in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).to(dtype)
