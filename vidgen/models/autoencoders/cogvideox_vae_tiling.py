# SPDX-License-Identifier: Apache-2.0
"""Tiles in space as diffusers cuts and blends them, for equal results.

Each tile begins a fixed step after the one before and ends where the frame does, so that the last may be a sliver; it
is blended with its already blended neighbours above and to the left. Tiles and overlaps are rounded separately in
pixels and in latent cells, and for some sizes the pieces do not add up to the frame: these are refused here, unless
diffusers' result is wanted as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cogvideox_vae_config import CogVideoXVAEConfig
from .tiling import Each


@dataclass(frozen=True)
class DiffusersTiling:
    """What ``enable_tiling`` takes; None is half of the configured sample size.

    Args:
        height, width: of a tile in pixels; larger frames are cut.
        overlap_height, overlap_width: share of a tile that is blended, between 0 and 1.
        allow_misaligned: accept tiles that do not add up to the frame, as diffusers does: the result then has gaps or
            repetitions, and another size.

    Raises:
        ValueError: a tile without a pixel, or an overlap outside of 0 to 1.
    """

    height: int | None = None
    width: int | None = None
    overlap_height: float = 1 / 6
    overlap_width: float = 1 / 5
    allow_misaligned: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"DiffusersTiling: {name} must be at least 1, got {value}")
        for name in ("overlap_height", "overlap_width"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"DiffusersTiling: {name} must lie in [0, 1), got {value}")

    def for_encoding(self, config: CogVideoXVAEConfig) -> Cuts:
        return self.cuts(config, encoding=True)

    def for_decoding(self, config: CogVideoXVAEConfig) -> Cuts:
        return self.cuts(config, encoding=False)

    def cuts(self, config: CogVideoXVAEConfig, encoding: bool) -> Cuts:
        """Lengths along height and width; cut to integers exactly where diffusers cuts them."""
        side = config.pixels_per_latent
        pixels = (self.height or config.sample_height // 2, self.width or config.sample_width // 2)
        cells = (int(pixels[0] / side), int(pixels[1] / side))
        if 0 in cells:
            raise ValueError(f"DiffusersTiling: a tile must have at least {side} pixels, got {pixels[0]} x {pixels[1]}")
        source, target = (pixels, cells) if encoding else (cells, pixels)
        overlaps = (self.overlap_height, self.overlap_width)
        step = tuple(int(length * (1 - overlap)) for length, overlap in zip(source, overlaps, strict=True))
        blend = tuple(int(length * overlap) for length, overlap in zip(target, overlaps, strict=True))
        if 0 in step:
            raise ValueError(f"DiffusersTiling: tiles of {source[0]} x {source[1]} leave no step with {overlaps}")
        keep = tuple(length - cut for length, cut in zip(target, blend, strict=True))
        return Cuts(source, step, blend, keep, (1, side) if encoding else (side, 1), self.allow_misaligned)


@dataclass(frozen=True)
class Cuts:
    """Size and step of a tile in the input, blended and kept length in the output, output per input length, and whether
    the pieces may add up to something else.
    """

    size: tuple[int, ...]
    step: tuple[int, ...]
    blend: tuple[int, ...]
    keep: tuple[int, ...]
    scale: tuple[int, int]
    allow_misaligned: bool = False


def run_diffusers_tiles(x: Tensor, run: Callable[[Tensor], Tensor], cuts: Cuts, *, each: Each = map) -> Tensor:
    """Blend ``run(tile)`` over the tiles of ``x`` ``(B, C, T, H, W)``, or run it on all of ``x`` if that is one tile.

    ``each`` calls ``run`` on all tiles; another than ``map`` may do so on several processes.

    Raises:
        ValueError: the pieces do not add up to the frame and are not allowed to.
    """
    height, width = x.shape[3:]
    if height <= cuts.size[0] and width <= cuts.size[1]:
        return run(x)
    tops, lefts = range(0, height, cuts.step[0]), range(0, width, cuts.step[1])
    tiles = (x[:, :, :, top : top + cuts.size[0], left : left + cuts.size[1]] for top in tops for left in lefts)
    results = each(run, tiles)
    rows = [[next(results) for _ in lefts] for _ in tops]
    lines = []
    for i, row in enumerate(rows):
        pieces = []
        for j, tile in enumerate(row):
            if i:
                tile = blend(rows[i - 1][j], tile, cuts.blend[0], 3)
            if j:
                tile = blend(row[j - 1], tile, cuts.blend[1], 4)
            row[j] = tile  # the next ones are blended with the blended one
            pieces.append(tile[:, :, :, : cuts.keep[0], : cuts.keep[1]])
        lines.append(torch.cat(pieces, 4))
    result = torch.cat(lines, 3)
    up, down = cuts.scale
    wanted = (height * up // down, width * up // down)
    if tuple(result.shape[3:]) != wanted and not cuts.allow_misaligned:
        raise ValueError(
            f"DiffusersTiling: the tiles of {height} x {width} add up to {result.shape[3]} x {result.shape[4]} instead "
            f"of {wanted[0]} x {wanted[1]}; choose others, or tile_size"
        )
    return result


def blend(before: Tensor, tile: Tensor, extent: int, axis: int) -> Tensor:
    """``tile`` with its beginning faded in over the end of ``before``, linearly from 0."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return tile
    share = torch.arange(extent, device=tile.device, dtype=torch.float64) / extent
    share = share.to(torch.promote_types(tile.dtype, torch.float32)).view([-1 if i == axis else 1 for i in range(5)])
    end = before.narrow(axis, before.shape[axis] - extent, extent)
    begin, rest = tile.split([extent, tile.shape[axis] - extent], axis)
    return torch.cat([(end * (1 - share) + begin * share).to(tile.dtype), rest], axis)
