# SPDX-License-Identifier: Apache-2.0
"""Overlapping tiles, each blended linearly into the tiles before it, as HunyuanVideo's autoencoder is tiled.

A tile is final once it has been blended with the tile above and then with the tile to the left, both final already.
So tiles are computed in reading order and written to the result at once; only the margins that later tiles need are
kept. The last tiles of a row or column are as small as what is left of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .tiling import Each

Code = Callable[[Tensor], Tensor]


@torch.no_grad()
def blend_tiles(code: Code, x: Tensor, size: int, out_size: int, overlap: float, *, each: Each = map) -> Tensor:
    """``code(x)`` in tiles of space.

    Args:
        code: tile ``(B, C, T, H, W)`` to its result, of any number of channels and frames.
        x: ``(B, C, T, H, W)``.
        size: side of a tile; the tiles start ``int(size * (1 - overlap))`` apart.
        out_size: side of the result of a whole tile. Of it, ``int(out_size * overlap)`` is blended, the rest kept.
        overlap: part of a tile that it shares with the next.
        each: calls ``code`` on all tiles; another than ``map`` may do so on several processes.

    Returns:
        The results, cropped and joined; no gradient.
    """
    stride, margin = int(size * (1 - overlap)), int(out_size * overlap)
    kept = out_size - margin
    rows: list[Tensor] = []
    above: list[Tensor] = []  # lower margins of the row of tiles above
    tops, starts = range(0, x.shape[3], stride), range(0, x.shape[4], stride)
    tiles = each(code, (x[:, :, :, top : top + size, start : start + size] for top in tops for start in starts))
    for _ in tops:
        row: list[Tensor] = []
        margins: list[Tensor] = []
        left: Tensor | None = None  # right margin of the tile to the left
        for column in range(len(starts)):
            tile = next(tiles)
            if above:
                blend(above[column], tile, 3, margin)
            if left is not None:
                blend(left, tile, 4, margin)
            row.append(tile[:, :, :, :kept, :kept].clone())
            margins.append(last(tile, 3, margin))
            left = last(tile, 4, margin)
            del tile  # not while the next one is computed
        rows.append(torch.cat(row, 4))
        above = margins
    return torch.cat(rows, 3)


def blend_frames(
    code: Code, x: Tensor, size: int, out_size: int, overlap: float, *, each: Each = map
) -> Iterator[Tensor]:
    """``code(x)`` in tiles of time, piece by piece.

    As in :func:`blend_tiles`, but a tile has one frame more than ``size``, and of every tile but the first the first
    frame of the result, which the tile saw as the start of a video, is dropped. The first piece has one frame more.

    Yields:
        ``(B, C, frames, H, W)``, no gradient; at least one frame each.
    """
    stride, margin = int(size * (1 - overlap)), int(out_size * overlap)
    kept = out_size - margin
    before: Tensor | None = None
    starts = range(0, x.shape[2], stride)
    tiles = each(code, (x[:, :, start : start + size + 1] for start in starts))
    for _ in starts:
        with torch.no_grad():  # as a decorator, it would hold the last piece while the next one is computed
            tile = next(tiles)
            piece = tile[:, :, : kept + 1]
            if before is not None:
                tile = tile[:, :, 1:]
                blend(before, tile, 2, margin)
                piece = tile[:, :, :kept]
            before = last(tile, 2, margin)
        if piece.shape[2]:
            yield piece
        del tile, piece


def blend(before: Tensor, tile: Tensor, dim: int, margin: int) -> None:
    """Fade from the end of ``before`` into the start of ``tile``, in place: ``a (1 - i / n) + b i / n``."""
    n = min(before.shape[dim], tile.shape[dim], margin)
    if n == 0:
        return
    weight = torch.arange(n, dtype=torch.float64, device=tile.device) / n
    weight = weight.view([-1 if i == dim else 1 for i in range(tile.dim())])
    wide = torch.promote_types(tile.dtype, torch.float32)
    start = tile.narrow(dim, 0, n)
    end = before.narrow(dim, before.shape[dim] - n, n)
    start.copy_(end * (1 - weight).to(wide) + start * weight.to(wide))


def last(tile: Tensor, dim: int, margin: int) -> Tensor:
    """A copy of the last entries along ``dim``: a view would keep the whole tile alive."""
    n = min(margin, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - n, n).clone()
