# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a CogVideoX video stand: rotary positions of three axes, and the added table of 2B.

Sources: diffusers (``get_3d_rotary_pos_embed``, ``get_resize_crop_region_for_grid``, ``get_3d_sincos_pos_embed``) and
THUDM/CogVideo ``sat/dit_video_concat.py``. A grid is the number of tokens along frames, rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidgen import ops

from .patches import Grid


def resized_crop(size: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The part of the trained grid that a video of another shape covers: ``(top, left)`` and ``(bottom, right)``.

    The video is enlarged or reduced until it fits inside ``base`` (rows, columns) and laid over its middle. Halves are
    rounded to even numbers.
    """
    (rows, columns), (base_rows, base_columns) = size, base
    if rows / columns > base_rows / base_columns:
        fit = base_rows, round(base_rows / rows * columns)
    else:
        fit = round(base_columns / columns * rows), base_columns
    top, left = (round((whole - part) / 2.0) for whole, part in zip(base, fit, strict=True))
    return (top, left), (top + fit[0], left + fit[1])


def linspace_positions(
    grid: Grid, crop: tuple[tuple[int, int], tuple[int, int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of each axis: frames counted from 0, rows and columns spread over ``crop``.

    Over n rows from a to b they run to ``b (n - 1) / n``: evenly spaced without the end if a is 0, and a little denser
    otherwise, as the models were trained.
    """
    frames, rows, columns = grid
    (top, left), (bottom, right) = crop
    return (
        torch.arange(frames, device=device, dtype=torch.float32),
        torch.linspace(top, bottom * (rows - 1) / rows, rows, device=device, dtype=torch.float32),
        torch.linspace(left, right * (columns - 1) / columns, columns, device=device, dtype=torch.float32),
    )


def rotary_table(
    grid: Grid,
    base: tuple[int, int],
    sections: tuple[int, int, int],
    kind: str,
    *,
    text_tokens: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(text_tokens + N, head_dim / 2)`` for ``ops.qk_norm_rope``, style "interleaved".

    Args:
        grid: of the video.
        base: rows and columns of the trained grid; unused by "slice".
        sections: channels of a head that belong to each axis.
        kind: "linspace" or "slice" (positions counted from 0, whatever the size).
        text_tokens: rows without rotation in front.

    Raises:
        ValueError: another ``kind``.
    """
    if kind == "linspace":
        positions = linspace_positions(grid, resized_crop(grid[1:], base), device)
        return ops.rope_3d_table(positions, sections, text_tokens=text_tokens, device=device)
    if kind == "slice":
        return ops.rope_3d_table(grid, sections, text_tokens=text_tokens, device=device)
    raise ValueError(f"rotary_table: kind must be 'linspace' or 'slice', got {kind!r}")


def sincos_table(
    grid: Grid, dim: int, *, spatial_scale: float, temporal_scale: float, device: torch.device | None = None
) -> Tensor:
    """``(N, dim)``: of each token, ``e(frame, dim/4)``, ``e(column, 3 dim/8)`` and ``e(row, 3 dim/8)``, side by side.

    ``e(x, m) = [sin(x w_k), cos(x w_k)]`` with ``w_k = 10000 ** (-2 k / m)`` in float64, and x the position divided by
    its scale. float32.
    """
    parts = []
    for axis, scale, width in (
        (0, temporal_scale, dim // 4),
        (2, spatial_scale, 3 * dim // 8),
        (1, spatial_scale, 3 * dim // 8),
    ):
        positions = torch.arange(grid[axis], device=device, dtype=torch.float32) / scale
        steps = torch.arange(width // 2, device=device, dtype=torch.float64) / (width / 2)
        angles = positions.double()[:, None] / 10000**steps
        table = torch.cat([angles.sin(), angles.cos()], 1).float()
        shape = [len(positions) if i == axis else 1 for i in range(3)]
        parts.append(table.view(*shape, width).expand(*grid, width))
    return torch.cat(parts, -1).flatten(0, 2)
