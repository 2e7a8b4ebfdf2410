# SPDX-License-Identifier: Apache-2.0
"""``haar_3d``, ``haar_2d`` and their inverses in Triton.

A tile is (rows, columns) of bands; the samples it is made of are loaded as whole rows, twice as long, and their even
and odd columns split in registers, so that every access is contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks, gpu, on_device_of, power_of_2, refuse_common, rows_side_by_side
from ._tuning import TUNING

haar_2d_refuses = refuse_common
haar_3d_refuses = refuse_common
inverse_haar_2d_refuses = refuse_common
inverse_haar_3d_refuses = refuse_common


@triton.jit
def load_columns(x, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum and difference of the two samples of each column."""
    both = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    return even + odd, even - odd


@triton.jit
def store_columns(x, total, difference, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    both = tl.reshape(tl.join(total + difference, total - difference), (ROWS, 2 * COLUMNS))
    tl.store(x, both.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_image_bands(y, top_sum, top_difference, bottom_sum, bottom_difference, alongside, down, constant, mask):
    """Bands of one frame: ``alongside`` steps to the band of differences along width, ``down`` along height."""
    kind = y.dtype.element_ty
    tl.store(y, ((top_sum + bottom_sum) * constant).to(kind), mask=mask)
    tl.store(y + down, ((top_sum - bottom_sum) * constant).to(kind), mask=mask)
    tl.store(y + alongside, ((top_difference + bottom_difference) * constant).to(kind), mask=mask)
    tl.store(y + alongside + down, ((top_difference - bottom_difference) * constant).to(kind), mask=mask)


@triton.jit
def load_image_bands(y, alongside, down, mask):
    """The inverse: sums and differences of columns in the upper and in the lower row."""
    plain = tl.load(y, mask=mask, other=0.0).to(tl.float32)
    rows = tl.load(y + down, mask=mask, other=0.0).to(tl.float32)
    columns = tl.load(y + alongside, mask=mask, other=0.0).to(tl.float32)
    both = tl.load(y + alongside + down, mask=mask, other=0.0).to(tl.float32)
    return plain + rows, columns + both, plain - rows, columns - both


@triton.jit
def analyse(
    x, y, channels, frames, height, width, band, x_batch, x_channel, x_frame, x_row, constant,
    ALONG_TIME: tl.constexpr, REPEAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``frames``, ``height`` and ``width`` are those of the bands, ``band`` the elements from one to the next."""
    across = tl.cdiv(width, COLUMNS)
    r = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (tl.program_id(0) % across) * COLUMNS
    c = first + tl.arange(0, COLUMNS)[None, :]
    wide = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
    frame = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(2) // channels).to(tl.int64)
    channel = (tl.program_id(2) % channels).to(tl.int64)
    mask = (r < height) & (c < width)
    read = (r < height) & (wide < 2 * width)
    BANDS: tl.constexpr = 8 if ALONG_TIME else 4
    to = y + batch * BANDS * band + (channel * frames + frame) * (height * width) + r * width + c
    source = x + batch * x_batch + channel * x_channel + 2 * r * x_row + wide
    if ALONG_TIME:
        if REPEAT:
            early = tl.maximum(2 * frame - 1, 0)
            late = 2 * frame
        else:
            early = 2 * frame
            late = early + 1
        a, b = load_columns(source + early * x_frame, read, ROWS, COLUMNS)
        c0, d0 = load_columns(source + early * x_frame + x_row, read, ROWS, COLUMNS)
        e, f = load_columns(source + late * x_frame, read, ROWS, COLUMNS)
        g, h = load_columns(source + late * x_frame + x_row, read, ROWS, COLUMNS)
        store_image_bands(to, a + e, b + f, c0 + g, d0 + h, band, 2 * band, constant, mask)
        store_image_bands(to + 4 * band, a - e, b - f, c0 - g, d0 - h, band, 2 * band, constant, mask)
    else:
        here = source + frame * x_frame
        a, b = load_columns(here, read, ROWS, COLUMNS)
        c0, d0 = load_columns(here + x_row, read, ROWS, COLUMNS)
        store_image_bands(to, a, b, c0, d0, 2 * band, band, constant, mask)


@triton.jit
def synthesise(
    y, x, channels, frames, height, width, band, y_batch, y_channel, y_frame, y_row, constant,
    ALONG_TIME: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``channels`` is that of the video, the other sizes are those of the bands."""
    across = tl.cdiv(width, COLUMNS)
    r = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (tl.program_id(0) % across) * COLUMNS
    c = first + tl.arange(0, COLUMNS)[None, :]
    wide = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
    frame = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(2) // channels).to(tl.int64)
    channel = (tl.program_id(2) % channels).to(tl.int64)
    mask = (r < height) & (c < width)
    written = (r < height) & (wide < 2 * width)
    plane = 4 * height * width
    source = y + batch * y_batch + channel * y_channel + frame * y_frame + r * y_row + c
    row = 2 * r * (2 * width) + wide
    if ALONG_TIME:
        a, b, c0, d0 = load_image_bands(source, band, 2 * band, mask)
        e, f, g, h = load_image_bands(source + 4 * band, band, 2 * band, mask)
        late = 2 * frame + 1 - (1 if DROP else 0)
        to = x + ((batch * channels + channel) * (2 * frames - (1 if DROP else 0)) + late) * plane + row
        early = written & (late > 0)
        store_columns(to - plane, (a + e) * constant, (b + f) * constant, early, ROWS, COLUMNS)
        store_columns(to - plane + 2 * width, (c0 + g) * constant, (d0 + h) * constant, early, ROWS, COLUMNS)
        store_columns(to, (a - e) * constant, (b - f) * constant, written, ROWS, COLUMNS)
        store_columns(to + 2 * width, (c0 - g) * constant, (d0 - h) * constant, written, ROWS, COLUMNS)
    else:
        a, b, c0, d0 = load_image_bands(source, 2 * band, band, mask)
        to = x + ((batch * channels + channel) * frames + frame) * plane + row
        store_columns(to, a * constant, b * constant, written, ROWS, COLUMNS)
        store_columns(to + 2 * width, c0 * constant, d0 * constant, written, ROWS, COLUMNS)


def tile(x: Tensor, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of bands in a tile; a column is two samples."""
    elements = TUNING[x.device.type].tile // 4
    columns = min(power_of_2(width), 128)
    return min(power_of_2(height), max(1, elements // columns)), columns


def as_video(x: Tensor) -> Tensor:
    x = rows_side_by_side(x)
    return x if x.dim() == 5 else x.unsqueeze(2)


def run_analysis(x: Tensor, constant: float, along_time: bool, repeat: bool) -> Tensor:
    """(batch, bands * channels, frames, height, width) of a video."""
    batch, channels, frames, height, width = x.shape
    bands, height, width = (8 if along_time else 4), height // 2, width // 2
    frames = (frames + 1) // 2 if along_time else frames
    y = torch.empty((batch, bands * channels, frames, height, width), dtype=x.dtype, device=x.device)
    rows, columns = tile(x, height, width)
    with on_device_of(x):
        analyse[(blocks(height, rows) * blocks(width, columns), frames, batch * channels)](
            x, y, channels, frames, height, width, channels * frames * height * width, *x.stride()[:4], constant,
            ALONG_TIME=along_time, REPEAT=repeat, ROWS=rows, COLUMNS=columns,
            **gpu(x, num_warps=TUNING[x.device.type].warps(4 * rows * columns)),
        )  # fmt: skip
    return y


def run_synthesis(y: Tensor, constant: float, along_time: bool, drop: bool) -> Tensor:
    batch, stacked, frames, height, width = y.shape
    channels = stacked // (8 if along_time else 4)
    new_frames = 2 * frames - int(drop) if along_time else frames
    x = torch.empty((batch, channels, new_frames, 2 * height, 2 * width), dtype=y.dtype, device=y.device)
    rows, columns = tile(y, height, width)
    with on_device_of(y):
        synthesise[(blocks(height, rows) * blocks(width, columns), frames, batch * channels)](
            y, x, channels, frames, height, width, channels * y.stride(1), *y.stride()[:4], constant,
            ALONG_TIME=along_time, DROP=drop, ROWS=rows, COLUMNS=columns,
            **gpu(y, num_warps=TUNING[y.device.type].warps(4 * rows * columns)),
        )  # fmt: skip
    return x


def haar_3d(x: Tensor, filter_constant: float, repeat_first_frame: bool) -> Tensor:
    return run_analysis(as_video(x), filter_constant, True, repeat_first_frame)


def inverse_haar_3d(y: Tensor, filter_constant: float, drop_first_frame: bool) -> Tensor:
    return run_synthesis(as_video(y), filter_constant, True, drop_first_frame)


def haar_2d(x: Tensor, filter_constant: float) -> Tensor:
    y = run_analysis(as_video(x), filter_constant, False, False)
    return y if x.dim() == 5 else y.squeeze(2)


def inverse_haar_2d(y: Tensor, filter_constant: float) -> Tensor:
    x = run_synthesis(as_video(y), filter_constant, False, False)
    return x if y.dim() == 5 else x.squeeze(2)
