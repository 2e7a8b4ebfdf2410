# SPDX-License-Identifier: Apache-2.0
"""Running a causal autoencoder over one long video in chunks, with what its layers remember from chunk to chunk.

Every layer is a stream: fed the frames of a video in pieces of any length, it returns the frames that it can already
know, exactly as the whole video would give them, and keeps the few input frames that later outputs still need. So a
chain of layers is exact for every number of frames and any chunks, without computing a frame twice. See each layer for
what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops


class Stream:
    """What the layers of one model remember of one video. A fresh one runs a whole video as a single chunk.

    The driver sets ``first`` and ``last`` for each chunk, and uses one Stream per video (and spatial tile). Nothing is
    stored in the modules, so several videos may pass through one model in turns.

    Whatever a layer wants of frames other than its chunk's it asks its Stream for: a subclass that gets them from other
    processes spreads the chunk over these.
    """

    def __init__(self) -> None:
        self.first = True
        self.last = True
        # Of the two frames that an upsampler makes of the frame it recalls, so many came with the chunk before.
        self.given_of_previous = 1
        self._kept: dict[nn.Module, Tensor] = {}

    def recall(self, layer: nn.Module) -> Tensor | None:
        """The frames ``layer`` kept from the chunks before, or None."""
        return self._kept.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember ``frames`` for the next chunk. They are copied: a view would keep its whole chunk alive."""
        if not self.last:
            self._kept[layer] = frames.clone()

    def keep_end(self, layer: nn.Module, x: Tensor, count: int, before: Tensor | None) -> None:
        """Remember the last ``count`` frames of ``cat(before, x)``, see :func:`last_frames`."""
        if not self.last:
            self.keep(layer, last_frames(x, count, before))

    @property
    def chunked(self) -> bool:
        """Whether the chunk is known not to be the whole video."""
        return not self.first

    def front(self, layer: nn.Module, x: Tensor, kernel: int, stride: int) -> Tensor | None:
        """What a causal convolution in time sees before ``x``; None at the start of a video.

        With m outputs, every frame from ``m * stride`` on of the front and ``x`` together is still needed by the next
        chunk and none before.
        """
        before = self.recall(layer)
        frames = x.shape[2] + (kernel - 1 if before is None else before.shape[2])
        if needed := frames - ((frames - kernel) // stride + 1) * stride:
            self.keep_end(layer, x, needed, before)
        return before

    def neighbours(self, layer: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The frame before ``x`` and the one after it, where they are known and the former is no still."""
        previous = self.recall(layer)
        if x.shape[2] > self.first:
            self.keep(layer, x[:, :, -1:])
        return previous, None

    def with_earlier(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Each ``(batch, tokens, ...)`` behind those of all earlier frames of the chunk."""
        return tokens

    def begins_with_still(self, x: Tensor) -> bool:
        """Whether the first frame of ``x`` is a still, where chunks of an odd number of frames begin with one."""
        return x.shape[2] % 2 == 1

    def group_norm(self, norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
        """``norm`` over all frames of the chunk, and SiLU of it in the same pass."""
        if silu:
            return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def last_frames(x: Tensor, count: int, before: Tensor | None) -> Tensor:
    """The last ``count`` frames of ``cat(before, x)``; without ``before``, x's first frame stands there repeatedly."""
    missing = count - x.shape[2]
    if missing <= 0:
        return x[:, :, -missing:]
    front = x[:, :, :1].expand(-1, -1, missing, -1, -1) if before is None else before[:, :, -missing:]
    return torch.cat((front, x), 2)


def split_frames(x: Tensor, first: int, rest: int) -> Iterator[Tensor]:
    """``x`` in chunks of ``first`` and then ``rest`` frames, the last one shorter, as views."""
    yield x[:, :, :first]
    for start in range(first, x.shape[2], rest):
        yield x[:, :, start : start + rest]


def mark_ends(chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool, bool]]:
    """Each chunk with whether it is the first and whether it is the last. Empty chunks are passed over.

    Raises:
        ValueError: no frame at all, or a chunk that is not 5-D or differs from the first in more than its frames.
    """
    previous: Tensor | None = None
    first = True
    for index, chunk in enumerate(chunks):
        if chunk.dim() != 5 or (previous is not None and _without_frames(chunk) != _without_frames(previous)):
            wanted = "(batch, channels, frames, height, width)"
            alike = "" if previous is None else f" like {tuple(previous.shape)} in all but frames"
            raise ValueError(f"stream: chunk {index} must be {wanted}{alike}, got {tuple(chunk.shape)}")
        if chunk.shape[2] == 0:
            continue
        if previous is not None:
            yield previous, first, False
            first = False
        previous = chunk
    if previous is None:
        raise ValueError("stream: the chunks must have at least one frame together, got none")
    yield previous, first, True


def _without_frames(chunk: Tensor) -> tuple[int, ...]:
    return *chunk.shape[:2], *chunk.shape[3:]


def regroup(chunks: Iterable[Tensor], factor: int) -> Iterator[tuple[Tensor, bool]]:
    """The same frames in chunks that a causal encoder can take, each with whether it is the first.

    The first has ``factor * n + 1`` frames and the others a multiple of ``factor``, as many as have arrived.

    Raises:
        ValueError: as :func:`mark_ends`, and a total that is not ``factor * n + 1``.
    """
    waiting: Tensor | None = None
    arrived, sent = 0, 0
    for chunk, _, _ in mark_ends(chunks):
        arrived += chunk.shape[2]
        chunk = chunk if waiting is None else torch.cat((waiting, chunk), 2)
        ready = (arrived - 1) // factor * factor + 1 - sent
        waiting = chunk[:, :, ready:] if ready < chunk.shape[2] else None
        if ready:
            yield chunk[:, :, :ready], sent == 0
        sent += ready
    if waiting is not None:
        raise ValueError(f"stream: the number of frames must be {factor}n + 1 (1, {factor + 1}, ...), got {arrived}")
