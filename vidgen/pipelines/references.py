# SPDX-License-Identifier: Apache-2.0
"""Images and videos that show some frames of what is to be sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vidgen.data.transforms import frame_indices, resize_crop
from vidgen.data.video import VideoError, open_video

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def read_reference(path: Path, height: int, width: int, *, fps: float | None = None, last: bool = False) -> Tensor:
    """An image or a whole video as ``(3, frames, height, width)`` in [-1, 1], centre-cropped and resized.

    Args:
        fps: of the frames to take from a video; None, or more than it has: its own.
        last: only the last frame of a video.

    Raises:
        ValueError: the file cannot be read.
    """
    if is_image(path):
        return resize_crop(_read_image(path)[None], height, width)
    with open_video(path) as reader:
        wanted = fps if fps is not None and fps < reader.fps else None
        interval = 1.0 if wanted is None or abs(reader.fps - wanted) < 0.1 else reader.fps / wanted
        count = -int(-reader.num_frames // interval)
        indices = frame_indices(reader.num_frames, reader.fps, wanted, count)
        return resize_crop(reader.frames(indices[-1:] if last else indices), height, width)


def _read_image(path: Path) -> Tensor:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'vidgen[video]'") from error
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise VideoError(f"{path}: not a readable image: {error}") from error
    rows = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return rows.view(picture.height, picture.width, 3)
