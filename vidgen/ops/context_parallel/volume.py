# SPDX-License-Identifier: Apache-2.0
"""What one attention layer sends, in elements that a rank gives to others, forward; shards are taken as equal.

``width`` is batch * heads * head_dim. The backward pass of Ulysses and of group parallelism sends the same again; that
of a ring sends k and v again, and their gradients, in float32, one hop more.
"""

from __future__ import annotations

from .layout import Groups


def ulysses_volume(tokens: float, width: float, ranks: int, text: float = 0, *, text_sharded: bool = True) -> float:
    """q, k, v and the result; text spread over the ranks alike, or, whole on each rank, its result only."""
    away = (ranks - 1) / ranks
    return width * away * (4 * tokens / ranks + (4 * text / ranks if text_sharded else text))


def ring_volume(tokens: float, width: float, ranks: int, text: float = 0) -> float:
    """k and v of one shard on each of ``ranks - 1`` hops; of text, whole on each rank, the result."""
    return width * (ranks - 1) / ranks * (2 * tokens + text)


def group_parallel_volume(tokens: float, width: float, ranks: int, sparse_n: int, text: float = 0) -> float:
    """The hidden states once, the text's mean all-reduced; q, k, v and the result inside cells of ranks."""
    members = Groups(0, sparse_n, "single", ranks).ulysses
    inside = 4 * tokens / ranks * (members - 1) / members
    return width * ((ranks - 1) / ranks * (tokens / ranks + 2 * text) + inside)
