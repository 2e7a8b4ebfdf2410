# SPDX-License-Identifier: Apache-2.0
"""Batches of frames in which the CogVideoX VAE works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def frame_batches(frames: int, size: int | Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of each batch of frames. What is left over by ``size`` joins the first.

    Raises:
        ValueError: a size below 1, or sizes of the batches that do not add up to ``frames``.
    """
    if isinstance(size, int):
        if size < 1:
            raise ValueError(f"frame_batches: a batch must have at least 1 frame, got {size}")
        rest = frames % size
        starts = [0, *range(size + rest, frames, size)]
        return [*zip(starts, [*starts[1:], frames], strict=True)]
    if sum(size) != frames or any(count < 1 for count in size):
        raise ValueError(f"frame_batches: the batches must add up to {frames} frames, got {list(size)}")
    stops = [sum(size[: i + 1]) for i in range(len(size))]
    return [*zip([0, *stops[:-1]], stops, strict=True)]


def sat_decode_batches(latents: int) -> list[int]:
    """The batches in which SAT's main branch decodes: ten at most, nearly equal, the longer ones first.

    They are those of diffusers up to 21 latent frames.
    """
    count = max(min(10, latents // 2), 1)
    return [latents // count + (i < latents % count) for i in range(count)]


def halved(frames: int, times: int) -> list[int]:
    """So many frames, and how many are left of them each time that pairs become one, but for the first of an odd
    number."""
    counts = [frames]
    for _ in range(times):
        counts.append((counts[-1] + 1) // 2)
    return counts


def first_frame(latent: int, counts: Sequence[int]) -> int:
    """Where in a batch latent frame ``latent`` begins, if the levels above it have ``counts`` frames.

    It only matters whether they are odd: a decoder's levels are where the latent is.
    """
    for count in reversed(counts):
        latent = max(0, 2 * latent - count % 2)
    return latent


def join(chunks: Iterator[Tensor], frames: int | None = None) -> Tensor:
    """The chunks along time. Where the number of frames is known, they are written into their place as they come."""
    if frames is None:
        return torch.cat([*chunks], 2)
    result, at = None, 0
    for chunk in chunks:
        if chunk.shape[2] == frames:
            return chunk
        if result is None:
            result = chunk.new_empty((*chunk.shape[:2], frames, *chunk.shape[3:]))
        result[:, :, at : at + chunk.shape[2]] = chunk
        at += chunk.shape[2]
        del chunk  # before the next one is computed
    assert result is not None and at == frames
    return result
