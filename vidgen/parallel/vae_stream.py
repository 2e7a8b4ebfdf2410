# SPDX-License-Identifier: Apache-2.0
"""What the layers of an autoencoder want of frames that other ranks hold: neighbours, earlier frames, statistics.

All messages go between two ranks, so that ranks without a frame need not take part, and each layer's are sent before
the layer computes, so that no rank waits for another's arithmetic, but for norms over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidgen.models.autoencoders.streaming import Stream, last_frames

from .vae_norm import group_norm


class Peers:
    """The first ``count`` ranks of a group, which hold consecutive frames."""

    def __init__(self, group: dist.ProcessGroup, count: int) -> None:
        self.group, self.count, self.rank = group, count, dist.get_rank(group)

    def swap(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """Send tensors to ranks, and fill others with what ranks send."""
        messages = [self._message(dist.isend, tensor.contiguous(), rank) for rank, tensor in sent.items()]
        messages += [self._message(dist.irecv, tensor, rank) for rank, tensor in received.items()]
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()

    def _message(self, post: Callable[..., Any], tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(post, tensor, dist.get_global_rank(self.group, rank), self.group)

    def collect(self, own: Tensor) -> Tensor:
        """Every rank's tensor of the same shape, stacked in the order of the ranks."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        whole = own.new_empty(self.count, *own.shape)
        whole[self.rank] = own
        self.swap(dict.fromkeys(others, own), {rank: whole[rank] for rank in others})
        return whole


class RankStream(Stream):
    """The Stream of a rank's share of the frames. One serves one video (and tile); ``begin`` before each round.

    Either one chunk is spread over the ranks (``spread``), and norms span all of them. Or each rank has a chunk of its
    own, then the next ones in another round: what the last rank keeps then goes to the first by :func:`carry`.
    """

    def __init__(self, *, spread: bool) -> None:
        super().__init__()
        self.spread = spread

    def begin(self, peers: Peers, shares: Sequence[int], latents: Sequence[int], *, first: bool, last: bool) -> None:
        """
        Args:
            peers: who has frames in this round.
            shares, latents: frames of the network's input, and latent frames, of each of them.
            first, last: whether it is the first round and whether it is the last.
        """
        self.peers, self.latents = peers, latents
        self.leads, self.ends = peers.rank == 0, peers.rank == peers.count - 1
        self.first, self.last = first and self.leads, last and self.ends
        # The first rank has what the last one kept, of which it has given one frame; a neighbour gives both.
        self.given_of_previous = 1 if self.leads else 2
        self.follows_still = first and peers.rank == 1 and shares[0] == 1

    @property
    def chunked(self) -> bool:
        return not self.spread

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        if self.ends:
            super().keep(layer, frames)

    def front(self, layer: nn.Module, x: Tensor, kernel: int, stride: int) -> Tensor | None:
        """Shares but the first begin one frame after a multiple of the stride, which fixes how many frames are seen."""
        if self.leads and self.ends:
            return super().front(layer, x, kernel, stride)
        count = kernel - stride
        if count == 0:
            return None
        before, arriving = self.recall(layer), {}
        if not self.leads:
            before = arriving[self.peers.rank - 1] = x.new_empty(*x.shape[:2], count, *x.shape[3:])
        if x.shape[2] < count:  # what the next rank sees begins before this share
            self.peers.swap({}, arriving)
            arriving = {}
        sent = {} if self.ends else {self.peers.rank + 1: last_frames(x, count, before)}
        self.peers.swap(sent, arriving)
        self.keep_end(layer, x, count, before)
        return before

    def neighbours(self, layer: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        previous, rank = self.recall(layer), self.peers.rank
        sent, arriving, following = {}, {}, None
        if not self.leads:
            sent[rank - 1] = x[:, :, :1]
            previous = arriving[rank - 1] = torch.empty_like(x[:, :, :1], memory_format=torch.contiguous_format)
        if not self.ends:
            sent[rank + 1] = x[:, :, -1:]
            following = arriving[rank + 1] = torch.empty_like(x[:, :, :1], memory_format=torch.contiguous_format)
        self.peers.swap(sent, arriving)
        if x.shape[2] > self.first:
            self.keep(layer, x[:, :, -1:])
        return None if self.follows_still else previous, following

    def with_earlier(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        own = torch.stack(tokens)
        area = own.shape[2] // self.latents[self.peers.rank]
        earlier = [own.new_empty(*own.shape[:2], area * n, *own.shape[3:]) for n in self.latents[: self.peers.rank]]
        later = range(self.peers.rank + 1, self.peers.count)
        self.peers.swap(dict.fromkeys(later, own), dict(enumerate(earlier)))
        return tuple(torch.cat((*earlier, own), 2))

    def begins_with_still(self, x: Tensor) -> bool:
        if not self.spread:
            return super().begins_with_still(x)
        return self.leads and sum(self.latents) % 2 == 1

    def group_norm(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        if not self.spread or self.peers.count == 1:
            return super().group_norm(norm, x, silu=silu)
        return group_norm(norm, x, silu, self.peers.collect)


def carry(streams: Sequence[RankStream], layers: nn.Module) -> None:
    """Between rounds: what the last rank kept of each tile's video becomes the first rank's."""
    peers, modules, weight = streams[0].peers, list(layers.modules()), next(layers.parameters())
    first, last = 0, peers.count - 1
    if first == last or peers.rank not in (first, last):
        return
    count = weight.new_empty(1, dtype=torch.int64)
    if peers.rank == last:
        places = {module: index for index, module in enumerate(modules)}
        kept = [(tile, places[layer], t) for tile, stream in enumerate(streams) for layer, t in stream._kept.items()]
        rows = [[tile, place, *t.shape] for tile, place, t in kept]
        peers.swap({first: count.fill_(len(rows))}, {})
        peers.swap({first: count.new_tensor(rows)}, {})
        peers.swap({first: torch.cat([t.flatten() for _, _, t in kept])}, {})
    for stream in streams:
        stream._kept.clear()
    if peers.rank == first:
        peers.swap({}, {last: count})
        header = count.new_empty(int(count.item()), 7)
        peers.swap({}, {last: header})
        rows = header.tolist()
        sizes = [math.prod(shape) for _, _, *shape in rows]
        values = weight.new_empty(sum(sizes))
        peers.swap({}, {last: values})
        for (tile, place, *shape), frames in zip(rows, values.split(sizes), strict=True):
            streams[tile]._kept[modules[place]] = frames.view(shape)
