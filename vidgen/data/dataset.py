# SPDX-License-Identifier: Apache-2.0
"""Clips as training samples, broken ones replaced, and the endless order in which they come.

Everything drawn at random for a sample follows from ``(seed, epoch, clip)`` alone, so neither the number of data
workers nor a resumed run changes what a sample is.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vidgen.data.annotations import Clip, read_annotations
from vidgen.data.transforms import crop_box, frame_indices, resize_crop
from vidgen.data.video import Backend, VideoError, open_video

__all__ = ["BrokenClipsError", "Clip", "ClipDataset", "ShuffledSampler", "read_annotations"]

logger = logging.getLogger(__name__)


class BrokenClipsError(ValueError):
    """More clips cannot be used than `ClipDataset` was told to bear."""


def _generator(*parts: object) -> torch.Generator:
    """A random stream that belongs to ``parts``; streams of different parts have nothing in common."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _label(clip: Clip) -> str:
    """The path, and which part of the file where the annotation names one."""
    label = str(clip.path)
    if (clip.start, clip.stop) != (0, None):
        label += f" frames {clip.start} to {'end' if clip.stop is None else clip.stop}"
    return label + (f" crop {list(clip.crop)}" if clip.crop else "")


class ClipDataset(Dataset[dict[str, Any]]):
    """Clips as ``{"video", "caption", "path", "replaced"}``.

    - ``video``: float32 ``(3, frames, height, width)`` in [-1, 1], `num_frames` neighbours at `fps` from a random place
      of the clip, centre-cropped and resized;
    - ``caption``: one of the clip's, drawn at random;
    - ``path``: the file that was read;
    - ``replaced``: JSON, a list of ``[clip, reason]`` of the broken clips that this sample was to come from, usually
      ``"[]"``. It is text so that the default collate function makes a list of it.

    Index ``epoch * len(dataset) + clip`` is the sample of that clip in that epoch, as `ShuffledSampler` counts; plain
    indices below ``len(dataset)`` are epoch 0. A clip that cannot be read, is too short or too slow is replaced by
    another one drawn from the sample's own random stream, and noted in ``broken``: its path, with the part of it that
    was wanted if not all of it, to the reason. Data workers have copies of the dataset: hand what comes from them to
    `note_replaced`.

    Args:
        clips: see `read_annotations`.
        fps: frames per second, or None for each clip's own.
        max_broken_fraction: of the clips that may be broken before BrokenClipsError stops the run; one always may.
        backend: see `vidgen.data.video.open_video`.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        num_frames: int,
        height: int,
        width: int,
        fps: float | None = None,
        seed: int = 0,
        *,
        max_broken_fraction: float = 0.02,
        backend: Backend = "auto",
    ) -> None:
        if not clips:
            raise ValueError("ClipDataset: clips must not be empty")
        if min(num_frames, height, width) < 1:
            raise ValueError(
                f"ClipDataset: num_frames, height and width must be positive, got {num_frames}, {height}, {width}"
            )
        if not 0 <= max_broken_fraction <= 1:
            raise ValueError(f"ClipDataset: max_broken_fraction must lie in [0, 1], got {max_broken_fraction}")
        self.clips = list(clips)
        self.num_frames, self.height, self.width, self.fps = num_frames, height, width, fps
        self.seed, self.backend = seed, backend
        self.max_broken = max(1, int(max_broken_fraction * len(self.clips)))
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            raise IndexError(f"ClipDataset: index must not be negative, got {index}")
        epoch, number = divmod(int(index), len(self.clips))
        generator = _generator("sample", self.seed, epoch, number)
        replaced: list[list[str]] = []
        for candidate in self._candidates(number, generator):
            clip = self.clips[candidate]
            # Also one met as broken before is tried again: another part of it may be sound, and what a sample becomes
            # must not depend on what this process has seen.
            try:
                video = self._read(clip, _generator("crop", self.seed, epoch, number, candidate))
            except VideoError as error:
                replaced.append([_label(clip), str(error).removeprefix(f"{clip.path}: ")])
                self.note_replaced([json.dumps(replaced[-1:])])
                continue
            caption = clip.captions[int(torch.randint(len(clip.captions), (), generator=generator))]
            return {"video": video, "caption": caption, "path": str(clip.path), "replaced": json.dumps(replaced)}
        raise BrokenClipsError(self._broken_text())

    def _candidates(self, number: int, generator: torch.Generator) -> Iterator[int]:
        """The clip asked for, then the others in an order drawn when first needed."""
        yield number
        yield from (i for i in torch.randperm(len(self.clips), generator=generator).tolist() if i != number)

    def _read(self, clip: Clip, generator: torch.Generator) -> Tensor:
        with open_video(clip.path, self.backend) as reader:
            stop = reader.num_frames if clip.stop is None else clip.stop
            if not clip.start < stop <= reader.num_frames:
                raise VideoError(f"frames {clip.start} to {stop} wanted, the clip has {reader.num_frames}")
            indices = frame_indices(
                stop - clip.start, reader.fps, self.fps, self.num_frames, start=clip.start, generator=generator
            )
            frames = reader.frames(indices)
        if clip.crop is not None:
            frames = crop_box(frames, clip.crop)
        return resize_crop(frames, self.height, self.width)

    def note_replaced(self, notes: Sequence[str]) -> None:
        """Take in the ``replaced`` texts of a batch. Raises BrokenClipsError when too many clips are broken."""
        for note in notes:
            for clip, reason in json.loads(note):
                if clip not in self.broken:
                    self.broken[clip] = reason
                    logger.warning("broken clip replaced: %s: %s", clip, reason)
        if len(self.broken) > self.max_broken:
            raise BrokenClipsError(self._broken_text())

    def _broken_text(self) -> str:
        listed = "\n".join(f"  {clip}: {reason}" for clip, reason in list(self.broken.items())[:20])
        more = f"\n  and {len(self.broken) - 20} more" if len(self.broken) > 20 else ""
        return (
            f"{len(self.broken)} of {len(self.clips)} clips cannot be used, "
            f"{self.max_broken} may be replaced:\n{listed}{more}"
        )


class ShuffledSampler(Sampler[int]):
    """An endless order of samples: epoch after epoch, each a permutation of its own.

    Sample number n, counted from 0 over the whole run, has the index ``epoch * length + clip`` with
    ``epoch = n // length``, which is what `ClipDataset` takes. The only state is a number: a run that has used n
    samples goes on exactly with ``start=n``. (Data workers read ahead: count the samples used, not those handed out.)

    Args:
        length: clips of an epoch.
        start: number of the first sample.
        batch, stride: of every ``stride`` batches of ``batch`` samples, only the first one comes: what is left belongs
            to other processes, which begin ``batch`` samples later each.
    """

    def __init__(self, length: int, seed: int = 0, start: int = 0, *, batch: int = 1, stride: int = 1) -> None:
        if length < 1 or start < 0:
            raise ValueError(f"ShuffledSampler: length must be positive, start not negative, got {length} and {start}")
        if batch < 1 or stride < 1:
            raise ValueError(f"ShuffledSampler: batch and stride must be positive, got {batch} and {stride}")
        self.length, self.seed, self.start = length, seed, start
        self.batch, self.stride = batch, stride

    def __iter__(self) -> Iterator[int]:
        order, of_epoch, first = [0], -1, self.start
        while True:
            for number in range(first, first + self.batch):
                epoch, position = divmod(number, self.length)
                if epoch != of_epoch:
                    order = torch.randperm(self.length, generator=_generator("order", self.seed, epoch)).tolist()
                    of_epoch = epoch
                yield epoch * self.length + order[position]
            first += self.batch * self.stride
