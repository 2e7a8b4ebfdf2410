# SPDX-License-Identifier: Apache-2.0
"""Large frames in overlapping tiles whose results are blended linearly where they overlap.

Unlike chunks in time this is an approximation: convolutions see zeros instead of pixels beyond a tile's border, and
attention is confined to the tile. Frames that fit into one tile are computed exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Each = Callable[..., Iterator[Tensor]]  # of the signature of map


@dataclass(frozen=True)
class Tiles:
    """Where the tiles lie, in latent cells: (start, stop) along height and along width."""

    rows: list[tuple[int, int]]
    columns: list[tuple[int, int]]
    overlap: int

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)


def place_tiles(
    height: int, width: int, *, tile_size: int | None, tile_overlap: int | None, pixels_per_cell: int
) -> Tiles:
    """Tiles over a frame of ``height x width`` latent cells; all have the same size, the last ones overlap more.

    Args:
        tile_size: side of a tile in pixels; None for one tile.
        tile_overlap: pixels that neighbours share at least; None for a quarter of ``tile_size``, rounded down.
        pixels_per_cell: both are multiples of it.

    Raises:
        ValueError: sizes that are not such multiples, not positive, or an overlap that leaves no progress.
    """
    if tile_size is None:
        if tile_overlap is not None:
            raise ValueError(f"tiles: tile_overlap needs tile_size, got tile_overlap={tile_overlap} alone")
        return Tiles([(0, height)], [(0, width)], 0)
    if tile_size < pixels_per_cell or tile_size % pixels_per_cell:
        raise ValueError(f"tiles: tile_size must be a positive multiple of {pixels_per_cell} pixels, got {tile_size}")
    size = tile_size // pixels_per_cell
    if tile_overlap is None:
        overlap = size // 4
    elif tile_overlap % pixels_per_cell or not 0 <= tile_overlap < tile_size:
        raise ValueError(
            f"tiles: tile_overlap must be a multiple of {pixels_per_cell} pixels, at least 0 and below "
            f"tile_size={tile_size}, got {tile_overlap}"
        )
    else:
        overlap = tile_overlap // pixels_per_cell
    return Tiles(_spans(height, size, overlap), _spans(width, size, overlap), overlap)


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    if length <= size:
        return [(0, length)]
    starts = [*range(0, length - size, size - overlap), length - size]
    return [(start, start + size) for start in starts]


def run_tiled(
    x: Tensor, tiles: Tiles, step: Callable[[int, Tensor], Tensor], *, in_unit: int, out_unit: int, each: Each = map
) -> Tensor:
    """Blend ``step(i, x's tile i)`` over all tiles; a cell is ``in_unit`` wide in x and ``out_unit`` in the result.

    ``each`` calls ``step`` on all tiles; another than ``map`` may do so on several processes.

    Each tile is weighted by a ramp that rises over its overlaps, and the sum is divided by the sum of weights, both in
    float32, so that the result is continuous across tile borders.
    """
    if len(tiles) == 1:
        return step(0, x)
    total: Tensor | None = None
    weights = torch.zeros(tiles.rows[-1][1] * out_unit, tiles.columns[-1][1] * out_unit, device=x.device)
    places = [(row, column) for row in tiles.rows for column in tiles.columns]
    cut = (x[..., top * in_unit : bottom * in_unit, a * in_unit : b * in_unit] for (top, bottom), (a, b) in places)
    results = each(step, range(len(places)), cut)
    for (top, bottom), (left, right) in places:
        y = next(results)
        if total is None:
            total = y.new_zeros((*y.shape[:3], *weights.shape), dtype=torch.float32)
        height = _ramp(top > 0, bottom < tiles.rows[-1][1], y.shape[-2], tiles.overlap * out_unit, x.device)
        width = _ramp(left > 0, right < tiles.columns[-1][1], y.shape[-1], tiles.overlap * out_unit, x.device)
        weight = height[:, None] * width
        region = (slice(top * out_unit, bottom * out_unit), slice(left * out_unit, right * out_unit))
        total[..., region[0], region[1]] += y * weight
        weights[region] += weight
        dtype = y.dtype
    assert total is not None  # there is at least one tile
    return total.div_(weights).to(dtype)


def _ramp(rises: bool, falls: bool, length: int, overlap: int, device: torch.device) -> Tensor:
    weight = torch.ones(length, device=device)
    rise = (torch.arange(overlap, device=device) + 0.5) / max(overlap, 1)
    if rises:
        weight[:overlap] *= rise
    if falls:
        weight[length - overlap :] *= rise.flip(0)
    return weight
