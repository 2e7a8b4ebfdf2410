# SPDX-License-Identifier: Apache-2.0
"""Whole runs of `vidgen sample` over processes, compared with one process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.checkpoints import hf
from vidgen.models.text import T5TextEncoder
from vidgen.parallel.sharding import local
from vidgen.pipelines import parallel, text_to_video
from vidgen.pipelines.text_to_video import Request, SampleSettings, Spread, sample_videos

Group = dist.ProcessGroup
STEPS = 2


@dataclass
class Seen:
    """What happened on one process."""

    latents: dict[int, Tensor] = field(default_factory=dict)  # by number of the request
    frames: list[Tensor] = field(default_factory=list)  # float, one tensor for each video that was written here
    predictions: list[int] = field(default_factory=list)  # samples in each call of the transformer
    tokens: list[int] = field(default_factory=list)  # of the video in each call of the first block
    decoded_together: int = 0
    weights: list[int] = field(default_factory=list)  # numbers in the parameters of a transformer on this process
    read: list[str] = field(default_factory=list)  # models that were read from their folders
    captions: int = 0


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    seen = Seen()
    sample_all, write_frames, to_frames = text_to_video.sample_all, text_to_video.write_frames, text_to_video.to_frames
    load, encode, read = text_to_video.load_transformer, T5TextEncoder.encode, hf.from_pretrained
    decode = parallel.parallel_decode_stream

    def noted_sample(*arguments: Any) -> Any:
        result = sample_all(*arguments)
        seen.latents |= dict(zip(arguments[5], result[0], strict=False))
        return result

    def noted_write(*arguments: Any) -> None:
        seen.frames.append(torch.empty(3, 0))
        write_frames(*arguments)

    def noted_frames(chunk: Tensor) -> Tensor:
        seen.frames[-1] = chunk if not seen.frames[-1].numel() else torch.cat([seen.frames[-1], chunk], 1)
        return to_frames(chunk)

    def noted_load(*arguments: Any) -> Any:
        transformer = load(*arguments)
        model = getattr(transformer, "model", transformer)
        if model is not None:
            seen.weights.append(sum(local(p).numel() for p in model.parameters()))
            model.register_forward_pre_hook(noted_call, with_kwargs=True)
            model.blocks[0].register_forward_pre_hook(noted_tokens, with_kwargs=True)
        return transformer

    def noted_call(module: Any, arguments: Any, named: Any) -> None:
        seen.predictions.append(len(arguments[0] if arguments else named["img"]))

    def noted_tokens(block: Any, arguments: Any, named: Any) -> None:
        streams = [t for t in (*arguments, *named.values()) if isinstance(t, Tensor) and t.dim() == 3]
        seen.tokens.append(streams[0].shape[1])

    def noted_decode(*arguments: Any, **options: Any) -> Any:
        seen.decoded_together += 1
        return decode(*arguments, **options)

    def noted_encode(encoder: Any, captions: Any) -> Any:
        seen.captions += len(captions)
        return encode(encoder, captions)

    def noted_read(cls: Any, *arguments: Any, **options: Any) -> Any:
        seen.read.append(cls.__name__)
        return read(cls, *arguments, **options)

    with (
        mock.patch.object(text_to_video, "sample_all", noted_sample),
        mock.patch.object(text_to_video, "write_frames", noted_write),
        mock.patch.object(text_to_video, "to_frames", noted_frames),
        mock.patch.object(text_to_video, "load_transformer", noted_load),
        mock.patch.object(T5TextEncoder, "encode", noted_encode),
        mock.patch.object(hf, "from_pretrained", noted_read),
        mock.patch.object(parallel, "parallel_decode_stream", noted_decode),
    ):
        yield seen


def requests_of(prompts: list[tuple[str, list[str]]]) -> list[Request]:
    return [Request(prompt, tuple(Path(file) for file in files)) for prompt, files in prompts]


def compare(
    group: Group,
    model: str,
    folder: str,
    prompts: list[tuple[str, list[str]]],
    settings: dict[str, Any],
    spreads: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """For each spread the largest differences from one process, and what each process did; on the first process."""
    requests, options = requests_of(prompts), SampleSettings(**settings)
    found: dict[str, dict[str, Any]] = {}
    one = Seen()
    if dist.get_rank() == 0:
        with watched() as one:
            wanted = sample_videos(model, requests, Path(folder) / "one", options)
    for name, sizes in spreads.items():
        with watched() as seen:
            results = sample_videos(model, requests, Path(folder) / name, options, Spread(**sizes))
        everyone: list[Any] = [None] * 4
        dist.all_gather_object(everyone, seen)
        if dist.get_rank() == 0:
            found[name] = {
                **differences(one, everyone),
                "same files": same_files(Path(folder), "one", name),
                "same results": [plain(r, name) for r in results] == [plain(r, "one") for r in wanted],
                "weights": [each.weights for each in everyone],
                "all weights": one.weights[0],
                "predictions": [each.predictions for each in everyone],
                "tokens": [max(each.tokens, default=0) for each in everyone],
                "all tokens": max(one.tokens),
                "decoded together": [each.decoded_together for each in everyone],
                "captions": [each.captions for each in everyone],
                "read": [each.read for each in everyone],
            }
    return found


def differences(one: Seen, everyone: list[Seen]) -> dict[str, float]:
    """Of all latents that a process has, and of all videos that one has written."""
    latents = [(one.latents[n], t) for each in everyone for n, t in each.latents.items()]
    assert {n for each in everyone for n in each.latents} == set(one.latents)
    frames = [frames for each in everyone for frames in each.frames]
    assert len(frames) == len(one.frames)
    scale = max(float(t.abs().max()) for t in one.latents.values())
    return {
        "latents": max(float((a - b).abs().max()) for a, b in latents) / scale,
        "frames": max(float((a - b).abs().max()) for a, b in zip(one.frames, frames, strict=True)),
    }


def same_files(folder: Path, one: str, other: str) -> bool:
    names = [sorted(path.name for path in (folder / name).iterdir()) for name in (one, other)]
    texts = [[facts_in(folder / name / file) for file in names[0] if file.endswith(".json")] for name in (one, other)]
    return names[0] == names[1] and texts[0] == texts[1]


def facts_in(file: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(file.read_text()).items() if name != "seconds"}


def plain(result: dict[str, Any], folder: str) -> dict[str, Any]:
    """What is returned of a video, without the time and with paths below the folder."""
    return {
        name: str(value).partition(f"/{folder}/")[2] if name in ("video", "sheet", "json") else value
        for name, value in result.items()
        if name != "seconds"
    }


def failing(group: Group, model: str, folder: str, settings: dict[str, Any], spread: dict[str, Any]) -> str:
    """What is raised here when the transformer gives nonsense on one process, at its second step."""
    calls = parallel.Transformer.__call__
    count = [0]

    def broken(transformer: Any, *arguments: Any, **named: Any) -> Tensor:
        count[0] += 1
        value = calls(transformer, *arguments, **named)
        return value * float("nan") if dist.get_rank() == 2 and count[0] == STEPS else value

    with mock.patch.object(parallel.Transformer, "__call__", broken):
        try:
            sample_videos(model, ["a", "b", "c", "d"], folder, SampleSettings(**settings), Spread(**spread))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def unwritten(group: Group, model: str, folder: str, settings: dict[str, Any]) -> str:
    """What is raised here when the first of the two videos of one pair cannot be written."""
    write = text_to_video.write_frames

    def fails(chunks: Any, video: Path, *rest: Any) -> None:
        next(iter(chunks))
        if video.name.startswith("000"):
            raise OSError("no space left")
        write(chunks, video, *rest)

    with mock.patch.object(text_to_video, "write_frames", fails):
        try:
            sample_videos(model, ["a", "b", "c", "d"], folder, SampleSettings(**settings), Spread(ulysses=2))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(group: Group, model: str, folder: str, settings: dict[str, Any], spread: dict[str, Any]) -> str:
    try:
        sample_videos(model, ["a"], folder, SampleSettings(**settings), Spread(**spread))
    except ValueError as error:
        return str(error)
    return "nothing"
