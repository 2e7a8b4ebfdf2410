# SPDX-License-Identifier: Apache-2.0
"""Who computes what of a video's autoencoding, and how the results come together."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.models.autoencoders.coding import Coding, Span, run
from vidgen.models.autoencoders.tiling import Each
from vidgen.ops.context_parallel.layout import shard_sizes

from .vae_stream import Peers, RankStream, carry

ALL, NOTHING = (0, 2**62), (0, 0)


def coded(coding: Coding, group: dist.ProcessGroup, wanted: Sequence[Span], tiles: bool) -> Iterator[Tensor]:
    """Of the result's frames, those in ``wanted[rank]``, in consecutive pieces of which some may be empty.

    Args:
        wanted: start and stop for each rank; they may overlap.
        tiles: deal the tiles to the ranks; else spread the frames.
    """
    if not tiles and coding.around is None:
        yield from rounds(coding, coding.x, group, wanted)
        return
    every = [ALL] * dist.get_world_size(group)
    outside = coding.tiles == 1 and coding.around is not None  # where the tiles are that are dealt
    dealt: Each = deal(group) if tiles else map

    def code(x: Tensor) -> Tensor:
        return join(run(coding, x, map if outside else dealt) if tiles else rounds(coding, x, group, every))

    if coding.around is None:
        pieces: Iterator[Tensor] = iter((code(coding.x),))
    else:
        pieces = coding.around(code, coding.x, dealt if outside else map)
    at, (start, stop) = 0, wanted[dist.get_rank(group)]
    for piece in pieces:
        yield piece[:, :, max(start - at, 0) : max(stop - at, 0)]
        at += piece.shape[2]
        del piece  # not while the next one is computed


def rounds(coding: Coding, x: Tensor, group: dist.ProcessGroup, wanted: Sequence[Span]) -> Iterator[Tensor]:
    """As :func:`coded`, of ``x``: one chunk spread over the ranks, or a chunk for each rank in every round."""
    rank, ranks, frames = dist.get_rank(group), dist.get_world_size(group), x.shape[2]
    chunks = coding.chunks(frames)
    spread = len(chunks) == 1
    turns, latents = [chunks[i : i + ranks] for i in range(0, len(chunks), ranks)], coding.latents(frames)
    sizes = shard_sizes(latents, min(ranks, latents))
    if spread:
        turns = [[video if coding.encodes else latent for latent, video in coding.shares(frames, sizes)]]
    streams = [RankStream(spread=spread) for _ in range(coding.tiles)]
    at = 0
    for index, spans in enumerate(turns):
        peers, last, y = Peers(group, len(spans)), index == len(turns) - 1, None
        if rank < peers.count:
            lengths = [stop - start for start, stop in spans]
            for stream in streams:
                stream.begin(peers, lengths, sizes if spread else lengths, first=index == 0, last=last)
            y = coding.in_tiles(lambda i, tile: coding.network(tile, streams[i]), x[:, :, slice(*spans[rank])], map)
            if not last:
                carry(streams, coding.layers)
        at += yield from deliver(y, x, group, [(start - at, stop - at) for start, stop in wanted])


def deliver(
    y: Tensor | None, like: Tensor, group: dist.ProcessGroup, wanted: Sequence[Span]
) -> Generator[Tensor, None, int]:
    """The frames ``wanted[rank]`` of what the ranks' ``y`` are together, rank by rank; returns how many these are.

    A rank without ``y`` has no frames. One that alone wants frames receives those of one rank at a time.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shape = (0,) * 5 if y is None else tuple(y.shape)
    shapes = [tuple(s.tolist()) for s in all_gather(torch.tensor(shape, device=like.device), group)]
    starts = [sum(s[2] for s in shapes[:i]) for i in range(ranks + 1)]
    peers = Peers(group, ranks)

    def overlap(source: int, taker: int) -> tuple[int, int]:
        """Of the source's frames, those that the taker wants."""
        start, stop = (min(max(end - starts[source], 0), shapes[source][2]) for end in wanted[taker])
        return start, max(start, stop)

    def place(source: int) -> Tensor:
        start, stop = overlap(source, rank)
        if y is not None and source == rank:
            return y[:, :, start:stop]
        batch, channels, _, height, width = shapes[source]
        return like.new_empty(batch, channels, stop - start, height, width)

    sources = [source for source in range(ranks) if shapes[source][2]]
    alone = sum(start < stop for start, stop in wanted) == 1
    for turn in [[source] for source in sources] if alone else [sources]:
        pieces = {source: place(source) for source in turn}
        sent: dict[int, Tensor] = {}
        if y is not None and rank in turn:
            spans = {taker: overlap(rank, taker) for taker in range(ranks) if taker != rank}
            sent = {taker: y[:, :, start:stop] for taker, (start, stop) in spans.items() if start < stop}
        peers.swap(sent, {source: piece for source, piece in pieces.items() if source != rank and piece.shape[2]})
        yield from pieces.values()
        del pieces  # not while the next ones arrive
    return starts[-1]


def deal(group: dist.ProcessGroup) -> Each:
    """A ``map`` that deals the calls to the ranks in turn, and yields every result on every rank in order."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def each(call: Any, *columns: Iterable[Any]) -> Iterator[Tensor]:
        calls = list(zip(*columns, strict=True))
        for first in range(0, len(calls), ranks):
            mine = first + rank
            y = call(*calls[mine]) if mine < len(calls) else None
            yield from deliver(y, calls[first][-1], group, [ALL] * ranks)

    return each


def all_gather(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group)
    return everyone


def join(pieces: Iterable[Tensor]) -> Tensor:
    """The pieces along time; no copy of the only one that has frames."""
    found = list(pieces)
    filled = [piece for piece in found if piece.shape[2]] or found[:1]
    return filled[0] if len(filled) == 1 else torch.cat(filled, 2)
