# SPDX-License-Identifier: Apache-2.0
"""The tokens of a model over processes: context parallelism, and the sequence parallelism of tensor parallelism.

The ranks of ``context`` (ring x Ulysses) hold consecutive shards of the video's tokens and of the text's, in the order
of the sequence; the ``tensor`` ranks of each share its shard in turn. A model's forward still takes everything and
returns everything, on each of these ranks.

The gradient is that of the sum over the processes of what each makes of its output: ``join`` adds up what comes back
from all of them. So each takes its share of the loss (divided by the ranks of a sequence) and gradients of parameters
are to be summed over these ranks; tensor-parallel parts of weights over the context ranks only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidgen.nn.sequence import DENSE, Kind, Place, Tokens
from vidgen.ops import context_parallel as cp
from vidgen.ops.context_parallel.exchange import gather, reduce_scatter
from vidgen.ops.context_parallel.layout import Placement, starts

from .layout import Layout

Skiparse = Literal["heads", "groups"]


def spread(model: nn.Module, layout: Layout, skiparse: Skiparse = "heads") -> None:
    """Let a model's tokens lie on the ranks of ``layout.context`` and ``layout.tensor`` from now on.

    Args:
        model: one with ``sequence``, as all transformers of ``vidgen.models`` have.
        skiparse: "heads": Ulysses and ring exchange queries, keys and values. "groups": whole Skiparse groups on each
            rank, so that only hidden states move, between the layers; for models with sparse layers.

    Raises:
        ValueError: the model has no tokens to spread, or no sparse layers for "groups"; "groups" with a ring or with
            tensor parallelism.
    """
    if not hasattr(model, "sequence"):
        raise ValueError(f"spread: model must be a transformer with `sequence`, got {type(model).__name__}")
    ratios = sorted({ratio for ratio, _ in getattr(model, "places", [])} | {1})
    if skiparse == "groups":
        if ratios == [1]:
            raise ValueError(f"spread: skiparse='groups' needs sparse layers, {type(model).__name__} has none")
        for name in ("ring", "tensor"):
            if layout.size(name) > 1:
                raise ValueError(f"spread: skiparse='groups' cannot go with {name}={layout.size(name)}; use ulysses")
    if layout.size("sequence") == 1:
        return
    # Only a ring computes on shards by themselves, which then have to begin where a round of groups does.
    multiple = cp.skiparse_multiple(ratios) if layout.size("ring") > 1 else 1
    kind: Callable[..., Tokens] = GroupTokens if skiparse == "groups" else ShardedTokens
    model.sequence = lambda video, text: kind(layout, Shape(video, text, multiple))  # type: ignore[assignment]


@dataclass(frozen=True)
class Shape:
    """Tokens of a sequence, and of what its shards are to be multiples."""

    video: int
    text: int
    multiple: int


@dataclass(frozen=True)
class Shares:
    """Rows of the video and of the text on every rank of ``context`` and, of its shard, of ``tensor``."""

    video: tuple[tuple[int, ...], ...]
    text: tuple[tuple[int, ...], ...]

    def of(self, kind: Kind, context: int) -> tuple[int, ...]:
        """Rows of each tensor rank of one context rank."""
        if kind == "joint":
            return tuple(a + b for a, b in zip(self.text[context], self.video[context], strict=True))
        return self.text[context] if kind == "text" else self.video[context]

    def shards(self, kind: Kind) -> tuple[int, ...]:
        """Rows of each context rank."""
        return tuple(sum(self.of(kind, context)) for context in range(len(self.video)))


@lru_cache(maxsize=64)
def shares_of(shape: Shape, context: int, tensor: int) -> Shares:
    def cut(length: int, multiple: int) -> tuple[tuple[int, ...], ...]:
        return tuple(cp.shard_sizes(n, tensor) for n in cp.shard_sizes(length, context, multiple))

    return Shares(cut(shape.video, shape.multiple), cut(shape.text, 1))


class ShardedTokens(Tokens):
    """Consecutive shards of video and text on each rank; attention by Ulysses, ring, or both."""

    grouped = False

    def __init__(self, layout: Layout, shape: Shape) -> None:
        self.layout, self.shape = layout, shape
        self.rank, self.tensor_rank = layout.rank("context"), layout.rank("tensor")
        self.shares = shares_of(shape, layout.size("context"), layout.size("tensor"))

    # Between all tokens and this process's

    def split(self, x: Tensor) -> Tensor:
        return self._own(x, self.shares.video)

    def split_text(self, y: Tensor) -> Tensor:
        return self._own(y, self.shares.text)

    def _own(self, x: Tensor, sizes: tuple[tuple[int, ...], ...]) -> Tensor:
        flat = [n for shard in sizes for n in shard]
        begin = starts(flat)
        place = self.rank * len(sizes[0]) + self.tensor_rank
        return x[:, begin[place] : begin[place + 1]]

    def join(self, x: Tensor, place: Place = DENSE) -> Tensor:
        flat = [n for shard in self.shares.video for n in shard]
        return gather(x, 1, flat, self.layout.group("sequence"))

    def rows(self, table: Tensor, of: Kind = "video", place: Place = DENSE) -> Tensor:
        return table.index_select(-2, self._numbers(of).to(table.device))

    def _numbers(self, of: Kind) -> Tensor:
        """Of the tokens that attention sees on this rank, in the order in which it does."""
        return token_numbers(self.shares, of, self.rank)

    # Tensor parallelism

    def gather(self, x: Tensor, of: Kind = "video") -> Tensor:
        sizes = self.shares.of(of, self.rank)
        return x if len(sizes) == 1 else gather(x, 1, sizes, self.layout.group("tensor"))

    def scatter(self, x: Tensor, of: Kind = "video") -> Tensor:
        sizes = self.shares.of(of, self.rank)
        return x if len(sizes) == 1 else reduce_scatter(x, 1, sizes, self.layout.group("tensor"))

    # Attention

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.layout.size("context") == 1:
            return super().attention(q, k, v)
        attended = self._exchanged(q, k, v, sizes=self.shares.shards("joint"))
        assert isinstance(attended, Tensor)
        return attended

    def skiparse_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        options = {name: value for name, value in options.items() if name not in ("grouped", "num_tokens")}
        if self.layout.size("context") == 1:
            return super().skiparse_attention(q, k, v, **options)
        text = self.shares.shards("text") if options.get("text_k") is not None else None
        return self._exchanged(q, k, v, sizes=self.shares.shards("video"), text_sizes=text, **options)

    def _exchanged(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        layout = self.layout
        if layout.size("ring") == 1:
            return cp.ulysses_attention(q, k, v, layout.group("ulysses"), **options)
        if layout.size("ulysses") == 1:
            return cp.ring_attention(q, k, v, layout.group("ring"), window=layout.window, **options)
        groups = layout.group("ulysses"), layout.group("ring")
        return cp.usp_attention(q, k, v, *groups, order=layout.order, window=layout.window, **options)


class GroupTokens(ShardedTokens):
    """Whole Skiparse groups on each rank: hidden states move between blocks, text lies on all ranks.

    In dense blocks the tokens are shards, and attention is that of Ulysses.
    """

    def split_text(self, y: Tensor) -> Tensor:
        return y

    def _placement(self, place: Place) -> Placement:
        ranks = self.layout.size("context")
        if place[0] == 1:
            return cp.Shards(self.shares.shards("video"))
        return cp.Groups(self.shape.video, *place, ranks)

    def move(self, x: Tensor, source: Place, target: Place) -> Tensor:
        before, after = self._placement(source), self._placement(target)
        return x if before == after else cp.move_tokens(x, before, after, self.layout.group("context"))

    def rows(self, table: Tensor, of: Kind = "video", place: Place = DENSE) -> Tensor:
        return table.index_select(-2, self._placement(place).tokens(self.rank).to(table.device))

    def skiparse_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        options = {name: value for name, value in options.items() if name not in ("grouped", "num_tokens")}
        placement = self._placement((options.pop("sparse_n"), options.pop("pattern")))
        group = self.layout.group("context")
        if isinstance(placement, cp.Shards):
            return cp.ulysses_attention(q, k, v, group, sizes=placement.sizes, **options)
        return cp.skiparse_group_parallel(q, k, v, placement, group, **options)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too
def token_numbers(shares: Shares, of: Kind, rank: int) -> Tensor:
    """Numbers of the tokens of one context rank, the tensor ranks' parts after each other; in a joint sequence, of
    which each part has its text first, the text's numbers come before the video's."""

    def parts(sizes: Sequence[Sequence[int]], offset: int) -> Sequence[Tensor]:
        begin = starts(n for shard in sizes for n in shard)
        first = rank * len(sizes[0])
        return [torch.arange(begin[first + t], begin[first + t + 1]) + offset for t in range(len(sizes[0]))]

    text, video = parts(shares.text, 0), parts(shares.video, 0)
    if of == "text":
        return torch.cat(list(text))
    if of == "video":
        return torch.cat(list(video))
    count = sum(shares.shards("text"))
    return torch.cat([rows for t, v in zip(text, video, strict=True) for rows in (t, v + count)])
