# SPDX-License-Identifier: Apache-2.0
"""How much the ranks send each other while a video's frames are spread over them; what is gathered comes on top."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidgen.models.autoencoders.coding import Coding
from vidgen.models.autoencoders.streaming import Stream
from vidgen.ops.context_parallel.layout import shard_sizes


class Volume(NamedTuple):
    """Elements that all ranks together send; statistics are of float32, the others of the input's dtype."""

    halos: int  # frames before convolutions and around interpolations: (ranks - 1) times those of one border
    attention: int  # keys and values of every frame, to each later rank
    statistics: int  # of every norm over all frames, from each rank to each other


class CountingStream(Stream):
    """Counts what a border between two ranks would need of the layers of one pass over a whole video."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents, self.halo, self.tokens, self.statistics = latents, 0, 0, 0

    def front(self, layer: nn.Module, x: Tensor, kernel: int, stride: int) -> Tensor | None:
        self.halo += (kernel - stride) * x[:, :, 0].numel()
        return super().front(layer, x, kernel, stride)

    def neighbours(self, layer: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        self.halo += 2 * x[:, :, 0].numel()
        return super().neighbours(layer, x)

    def with_earlier(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        self.tokens += sum(t.numel() // self.latents for t in tokens)
        return super().with_earlier(*tokens)

    def group_norm(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        self.statistics += 3 * x.shape[0] * norm.num_groups
        return super().group_norm(norm, x, silu=silu)


@torch.no_grad()
def frames_volume(coding: Coding, ranks: int) -> Volume:
    """What ``split="frames"`` sends, for a coding of one chunk and one tile, from one pass over the whole input.

    An autoencoder and an input on the meta device do; so is the volume of sizes found that no memory holds.

    Raises:
        ValueError: several chunks or tiles.
    """
    frames = coding.x.shape[2]
    chunks, tiles = len(coding.chunks(frames)), coding.tiles
    if chunks > 1 or tiles > 1 or coding.around is not None:
        raise ValueError(f"frames_volume: coding must be of one chunk and one tile, got {chunks} and {tiles}")
    latents = coding.latents(frames)
    sizes = shard_sizes(latents, min(ranks, latents))
    stream, count = CountingStream(latents), len(sizes)
    coding.network(coding.x, stream)
    attention = stream.tokens * sum(size * (count - 1 - rank) for rank, size in enumerate(sizes))
    return Volume(stream.halo * (count - 1), attention, stream.statistics * count * (count - 1))
