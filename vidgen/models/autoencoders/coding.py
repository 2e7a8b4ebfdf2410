# SPDX-License-Identifier: Apache-2.0
"""One half of an autoencoder and its input, described for whoever runs it in another way than the model does itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from .streaming import Stream
from .tiling import Each

Span = tuple[int, int]  # start and stop


def one_tile(step: Callable[[int, Tensor], Tensor], x: Tensor, each: Each) -> Tensor:
    return step(0, x)


@dataclass(frozen=True)
class Coding:
    """How ``encode_moments`` or ``decode`` comes by its result.

    Args:
        x: what is coded, ``(batch, channels, frames, height, width)``: the video, or the latent that the decoder sees.
        encodes: whether ``x`` is a video.
        layers: the module whose layers keep frames in a Stream.
        network: x or a part of it, and a Stream, to its moments or video.
        chunks: the chunks of so many frames of x, each with a Stream that remembers the one before.
        independent: norms see one chunk, and frames are counted from its start; else chunks do not change the result.
        latents: how many latent frames belong to so many frames of x; of a chunk's where these are independent.
        first_frame: ``first_frame(i, n)`` is where in the video latent frame i begins, if x, or the chunk, has n
            frames; for the one after the last, where a decoded video ends.
        tiles: number of tiles that a chunk is cut into.
        in_tiles: ``in_tiles(step, chunk, each)`` blends ``step(i, tile i)``, called by ``each``, a kind of map.
        around: ``around(code, x, each)`` blends ``code(tile)`` over tiles whose chunks are their own, piece by piece;
            None where there are no such tiles.
    """

    x: Tensor
    encodes: bool
    layers: nn.Module
    network: Callable[[Tensor, Stream], Tensor]
    chunks: Callable[[int], list[Span]]
    latents: Callable[[int], int]
    first_frame: Callable[[int, int], int]
    independent: bool = False
    tiles: int = 1
    in_tiles: Callable[[Callable[[int, Tensor], Tensor], Tensor, Each], Tensor] = one_tile
    around: Callable[[Callable[[Tensor], Tensor], Tensor, Each], Iterator[Tensor]] | None = None

    def segments(self, frames: int) -> list[Span]:
        """The parts of so many frames of x for which ``latents`` and ``first_frame`` hold."""
        return self.chunks(frames) if self.independent else [(0, frames)]

    def shares(self, frames: int, counts: Sequence[int]) -> list[tuple[Span, Span]]:
        """Consecutive shares of so many latent frames each: these, and the frames of the video that belong to them."""
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        places = [self._place(start, frames) for start in starts]
        return list(zip(pairwise(starts), pairwise(places), strict=True))

    def _place(self, latent: int, frames: int) -> int:
        video = 0
        for start, stop in self.segments(frames):
            length = stop - start
            count = self.latents(length)
            here = min(latent, count)
            video += length if self.encodes and here == count else self.first_frame(here, length)
            latent -= here
        return video


def run(coding: Coding, x: Tensor, each: Each = map) -> Iterator[Tensor]:
    """``x``, in place of the coding's own, on one process: the results of its chunks."""
    streams = [Stream() for _ in range(coding.tiles)]
    for start, stop in coding.chunks(x.shape[2]):
        for stream in streams:
            stream.first, stream.last = start == 0, stop == x.shape[2]
        yield coding.in_tiles(lambda i, tile: coding.network(tile, streams[i]), x[:, :, start:stop], each)
