# SPDX-License-Identifier: Apache-2.0
"""The WFVAE's Haar transforms as modules: they hold the taps that checkpoints carry; the ops compute.

The taps are constants. ``check_taps`` refuses a checkpoint whose taps are others, since they would not be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vidgen import ops

from .streaming import Stream

FILTER_CONSTANT = 0.3536  # as released; 8 ** -0.5 would be exact
BANDS = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
FILTER_CONSTANT_2D = 0.5
BANDS_2D = ("aa", "ad", "da", "dd")


def haar_taps() -> dict[str, Tensor]:
    """The filter ``(1, 1, 2, 2, 2)`` of each band; signs alternate along time, height and width, in this order."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu") * FILTER_CONSTANT ** (1 / 3)
    taps = {}
    for name, (time, height, width) in zip(BANDS, product((0, 1), repeat=3), strict=True):
        cube = signs[time][:, None, None] * signs[height][:, None] * signs[width]
        taps[name] = (cube.sign() * FILTER_CONSTANT)[None, None]
    return taps


def haar_taps_2d() -> dict[str, Tensor]:
    """The filter ``(1, 1, 2, 2)`` of each band of a frame; "ad" alternates along the height, "da" along the width."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    taps = {}
    for name, (width, height) in zip(BANDS_2D, product((0, 1), repeat=2), strict=True):
        taps[name] = (signs[height][:, None] * signs[width] * FILTER_CONSTANT_2D)[None, None]
    return taps


class Haar3D(nn.Module):
    """Eight bands at half the size: T frames to (T - 1) / 2 + 1.

    The first frame is paired with itself, the following ones two by two, so that nothing is kept between chunks if
    every chunk after the first has an even number of frames.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, taps in haar_taps().items():
            band = nn.Module()
            band.conv = nn.Module()
            band.conv.register_buffer("weight", taps)
            self.add_module(f"{name}_conv", band)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return ops.haar_3d(x, filter_constant=FILTER_CONSTANT, repeat_first_frame=stream.first)


class InverseHaar3D(nn.Module):
    """The video of eight bands: T frames to 2T - 1. The first of the 2T is a copy of the second and left out.

    Each frame of bands gives two frames of its own, so that nothing is kept between chunks.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, taps in haar_taps().items():
            self.register_buffer(name, taps)

    def forward(self, y: Tensor, stream: Stream) -> Tensor:
        return ops.inverse_haar_3d(y, filter_constant=FILTER_CONSTANT, drop_first_frame=stream.first)


class Haar2D(nn.Module):
    """Four bands of each frame at half the size."""

    def __init__(self) -> None:
        super().__init__()
        for name, taps in haar_taps_2d().items():
            self.register_buffer(name, taps)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return ops.haar_2d(x, filter_constant=FILTER_CONSTANT_2D)


class InverseHaar2D(Haar2D):
    """The frames of four bands."""

    def forward(self, y: Tensor, stream: Stream) -> Tensor:
        return ops.inverse_haar_2d(y, filter_constant=FILTER_CONSTANT_2D)


def all_taps(*, frames_apart: bool = False) -> dict[str, Tensor]:
    """The taps of a whole WFVAE by their names in its state dict; ``frames_apart``: those of level 1 are 2-D."""
    cubes, squares = haar_taps(), haar_taps_2d()
    found = {}
    for place in ("in", "l1", "l2"):
        flat = frames_apart and place == "l1"
        for name, taps in (squares if flat else cubes).items():
            found[f"encoder.wavelet_transform_{place}.{name}" + ("" if flat else "_conv.conv.weight")] = taps
    for place in ("out", "l1", "l2"):
        for name, taps in (squares if frames_apart and place == "l1" else cubes).items():
            found[f"decoder.inverse_wavelet_transform_{place}.{name}"] = taps
    return found


def check_taps(state: Mapping[str, Any], *, frames_apart: bool = False) -> None:
    """Raise ValueError if ``state`` has taps that differ by more than the rounding of 16-bit formats."""
    for name, taps in all_taps(frames_apart=frames_apart).items():
        given = state.get(name)
        if isinstance(given, Tensor) and not (
            given.shape == taps.shape and torch.allclose(given.float(), taps, rtol=4e-3, atol=0)
        ):
            raise ValueError(f"WFVAE: {name} must be the Haar taps of magnitude {float(taps.max()):.4g}, got others")
