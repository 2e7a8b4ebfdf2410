# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a forward pass lie. Blocks name the few points at which tokens must meet."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vidgen import ops

Place = tuple[int, str]  # the Skiparse ratio and pattern of the block that works on the tokens
Kind = Literal["video", "text", "joint"]  # joint: this process's text tokens, then its video tokens
DENSE: Place = (1, "single")


class Tokens:
    """The tokens of one forward pass: here all of them on this process, so that nothing happens.

    ``vidgen.parallel.context`` has them spread over processes. There a block computes on some tokens,
    ``gather`` brings those of the processes together which each hold a part of the weights (tensor parallelism),
    ``scatter`` adds up the partial results of these and gives each its own tokens back, and attention exchanges what
    it needs. In the way of ``skiparse_group_parallel`` tokens also ``move`` between blocks.
    """

    grouped = True  # whether queries may be written in the group layout of ``ops.qk_norm_rope``

    def split(self, x: Tensor) -> Tensor:
        """All video tokens ``(B, N, ...)`` to this process's."""
        return x

    def split_text(self, y: Tensor) -> Tensor:
        """All text tokens ``(B, S, ...)`` to this process's."""
        return y

    def move(self, x: Tensor, source: Place, target: Place) -> Tensor:
        """Video tokens from where one block needs them to where another does."""
        return x

    def join(self, x: Tensor, place: Place = DENSE) -> Tensor:
        """This process's video tokens to all of them, in order, on each process."""
        return x

    def rows(self, table: Tensor, of: Kind = "video", place: Place = DENSE) -> Tensor:
        """The rows ``(..., tokens, channels)`` of a table that belong to the tokens which attention sees here; of a
        joint table, text comes first."""
        return table

    def gather(self, x: Tensor, of: Kind = "video") -> Tensor:
        """Tokens ``(B, tokens, ...)`` of all processes that hold a part of the same weights."""
        return x

    def scatter(self, x: Tensor, of: Kind = "video") -> Tensor:
        """The inverse of ``gather``, of the sum over these processes."""
        return x

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``ops.attention`` of all tokens of text and video together."""
        attended = ops.attention(q, k, v)
        assert isinstance(attended, Tensor)
        return attended

    def skiparse_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """``ops.skiparse_attention`` of all tokens; masks are those of all tokens too."""
        return ops.skiparse_attention(q, k, v, **options)


ALONE = Tokens()


def alone(video: int, text: int) -> Tokens:
    """The tokens of one process: what a model makes of its counts of video and text tokens before it is spread."""
    return ALONE
