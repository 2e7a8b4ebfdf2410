# SPDX-License-Identifier: Apache-2.0
"""Runs of the trainer whose processes encode for each other, and the exchange itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from layouts import make_layout
from trainer_cases import changed

from vidgen.models.text import T5TextEncoder
from vidgen.parallel import Parallel
from vidgen.train import loop
from vidgen.train.encoding import exchange
from vidgen.train.ranks import Ranks
from vidgen.train.recipe import load_recipe
from vidgen.train.tasks import DiTTask

Group = dist.ProcessGroup
Events = list[str]


def run(group: Group, values: dict[str, Any], changes: dict[str, Any], **parallel: Any) -> Events:
    """A run of all processes; what this one did."""
    layout = make_layout(4, **parallel)
    recipe = load_recipe(changed(values, {**changes, "parallel": vars(Parallel(**parallel))}))
    with watched() as events:
        loop.train(recipe, layout=layout)
    dist.barrier()
    return events


@contextlib.contextmanager
def watched() -> Iterator[Events]:
    """What happens on this process, in order: "clip" and "caption" where one is encoded, "loss" where one is computed,
    and moves of the encoders. What happens while the task is built is left out."""
    events: Events = []
    encoders: set[int] = set()
    build, to = DiTTask.__init__, torch.nn.Module.to

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return function(*arguments, **options)

        return call

    def built(task: DiTTask, *arguments: Any, **options: Any) -> None:
        build(task, *arguments, **options)
        encoders.update(id(part) for part in (task.vae, task.encoders))
        events.clear()

    def moved(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        if id(module) in encoders:
            events.append(f"{type(module).__name__} to {arguments[0]}")
        return to(module, *arguments, **options)

    with (
        mock.patch.object(DiTTask, "__init__", built),
        mock.patch.object(DiTTask, "features", noted("clip", DiTTask.features)),
        mock.patch.object(T5TextEncoder, "encode", noted("caption", T5TextEncoder.encode)),
        mock.patch.object(DiTTask, "loss", noted("loss", DiTTask.loss)),
        mock.patch.object(torch.nn.Module, "to", moved),
    ):
        yield events


def resumed(group: Group, values: dict[str, Any], changes: dict[str, Any], **parallel: Any) -> Events:
    """A run that ends in the middle of a round and goes on."""
    steps = values["training"]["steps"]
    run(group, values, {**changes, "training": {"steps": 1}}, **parallel)
    return run(group, values, {**changes, "training": {"steps": steps}}, **parallel)


def broken(group: Group, values: dict[str, Any]) -> str:
    """What is raised here if a clip cannot be encoded on one process."""

    def fails(task: DiTTask, *arguments: Any) -> Any:
        if dist.get_rank() == 3:
            raise ValueError("this clip is bad")
        return encode(task, *arguments)

    encode = DiTTask.encode
    with mock.patch.object(DiTTask, "encode", fails):
        try:
            run(group, values, {"output": str(Path(values["output"]) / "broken")}, ulysses=2)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def exchanged(group: Group) -> bool:
    """Batches that differ in number, names, dtypes and shapes arrive everywhere as they were."""
    layout = make_layout(4, ulysses=4)

    def batches_of(rank: int) -> list[dict[str, Any]]:
        random = torch.Generator().manual_seed(rank)
        return [
            {
                "latents": torch.randn(1, 4, 1 + rank, 2 + i, 3, generator=random).to(torch.bfloat16),
                "mask": torch.rand(3 + rank + i, generator=random) < 0.5,
                "odd": torch.randn(2, 5, generator=random, dtype=torch.float64).T,
                "scalar": torch.tensor(rank + 0.5),
                "empty": torch.empty(0, 3),
                "caption": [f"{rank} {i}"],
                **({"more": torch.arange(3)} if i else {}),
            }
            for i in range(rank)
        ]

    ranks = Ranks(layout).of_replica()
    got = exchange(batches_of(ranks.rank), ranks, torch.device("cpu"))
    assert [len(batches) for batches in got] == [0, 1, 2, 3]
    pairs = [pair for rank in range(4) for pair in zip(got[rank], batches_of(rank), strict=True)]
    return all(a.keys() == b.keys() and all(same(a[name], b[name]) for name in b) for a, b in pairs)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, torch.Tensor) else bool(a == b)


def replicas(group: Group) -> bool:
    """Ranks of a replica are those of its pipeline and sequence, and no others."""
    ranks = Ranks(make_layout(4, pipeline=2)).of_replica()
    members = ranks.gather(dist.get_rank())
    return members == [dist.get_rank() % 2, dist.get_rank() % 2 + 2] and members[ranks.rank] == dist.get_rank()
