# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the trainer on processes of the pool."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from layouts import layout_of
from safetensors.torch import load_file

from vidgen.io import lock_directory
from vidgen.parallel import Parallel
from vidgen.parallel.sharding import local
from vidgen.train import loop
from vidgen.train.errors import TrainingStopped
from vidgen.train.metrics import read_metrics
from vidgen.train.recipe import load_recipe
from vidgen.train.skipped import replay
from vidgen.train.tasks import VAETask

Group = dist.ProcessGroup
WEIGHTS = "diffusion_pytorch_model.safetensors"


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe with sections changed."""
    merged = dict(values)
    for name, section in changes.items():
        old = values.get(name)
        merged[name] = {**old, **section} if isinstance(section, dict) and isinstance(old, dict) else section
    return merged


def on_rank_0(function: Callable[[], Any]) -> Any:
    """What the function returns there, on all processes."""
    answer = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return answer[0]


def run(values: dict[str, Any], changes: dict[str, Any], parallel: dict[str, Any] | None) -> dict[str, Any]:
    """A run of all processes, or of this one alone."""
    recipe = load_recipe(changed(values, changes))
    if parallel is None:
        return loop.train(recipe)
    section = Parallel(**parallel)
    recipe.parallel = section
    return loop.train(recipe, layout=layout_of(section))


def losses(folder: str | Path) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(folder) / "metrics.jsonl")]


def difference(one: Path, other: Path) -> float:
    """The largest between the tensors of two files."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def compare(group: Group, values: dict[str, Any], parallel: dict[str, Any], **changes: Any) -> dict[str, float]:
    """Differences of losses, weights and averages between a run of many processes and one of one process."""
    layout = layout_of(Parallel(**parallel))
    output, steps = Path(values["output"]), values["training"]["steps"]
    accumulation = changes.pop("accumulation", 1)
    run(values, {**changes, "output": str(output / "many"), "training": {"accumulation": accumulation}}, parallel)
    more = {"accumulation": accumulation * layout.size("data")}
    on_rank_0(lambda: run(values, {**changes, "output": str(output / "one"), "training": more}, None)["step"])
    checkpoint = f"step_{steps:08d}"
    found = {
        "loss": max(abs(a - b) for a, b in zip(losses(output / "many"), losses(output / "one"), strict=True)),
        "steps": float(len(losses(output / "many"))),
    }
    for part in ("model", "ema"):
        found[part] = difference(
            output / "many" / checkpoint / part / WEIGHTS, output / "one" / checkpoint / part / WEIGHTS
        )
    configs = [json.loads((output / n / checkpoint / "ema" / "config.json").read_text()) for n in ("many", "one")]
    assert configs[0].keys() == configs[1].keys() and configs[0]["_class_name"] == configs[1]["_class_name"]
    if "shift" in configs[0]:
        pairs = zip(configs[0]["shift"], configs[1]["shift"], strict=True)
        found["statistics"] = max(abs(a - b) for a, b in pairs)
    dist.barrier()
    return found


class Spoiled:
    """While it is active, the loss of these steps is NaN on one process."""

    def __init__(self, rank: int, steps: list[int]) -> None:
        original, count = VAETask.loss, iter(range(1, 1000))

        def loss(task: Any, batch: Any, generator: torch.Generator) -> Any:
            value, terms = original(task, batch, generator)
            wrong = next(count) in steps and dist.get_rank() == rank
            return (value * float("nan") if wrong else value), terms

        self.patch = mock.patch.object(VAETask, "loss", loss)


def spoiled(group: Group, values: dict[str, Any], rank: int, steps: list[int]) -> dict[str, Any]:
    try:
        with Spoiled(rank, steps).patch:
            report = run(values, {}, {})
    except TrainingStopped as error:
        return {"error": type(error).__name__, "text": str(error)}
    found = {"skipped": report["skipped_steps"]}
    if dist.get_rank() == 0:
        recipe = load_recipe(values)
        found["replayed"] = float(replay(recipe, Path(values["output"]) / "skipped" / "step_00000001")["loss"])
        whole = {"output": values["output"] + "2", "training": {"steps": 1, "accumulation": 4}}
        run(values, whole, None)
        found["loss without the fault"] = losses(whole["output"])[0]
    dist.barrier()
    return found


def terminated(group: Group, values: dict[str, Any], rank: int, step: int) -> dict[str, Any]:
    original = loop._Run._step

    def with_signal(this: Any) -> Any:
        if this.step + 1 == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(this)

    with mock.patch.object(loop._Run, "_step", with_signal):
        report = run(values, {}, {})
    found = {"finished": report["finished"], "step": report["step"]}
    found["then"] = run(values, {}, {})["finished"]
    whole = values["output"] + "2"
    run(values, {"output": whole}, {})
    ends = [Path(output) / f"step_{values['training']['steps']:08d}" for output in (values["output"], whole)]
    found["same"] = losses(values["output"]) == losses(whole) and not difference(
        *(end / "ema" / WEIGHTS for end in ends)
    )
    dist.barrier()
    return found


def raised(function: Callable[[], Any]) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def locked(group: Group, values: dict[str, Any]) -> tuple[str, str]:
    with lock_directory(values["output"]) if dist.get_rank() == 3 else contextlib.nullcontext():
        dist.barrier()
        found = raised(lambda: run(values, {}, {}))
        dist.barrier()
    return found


def different_recipes(group: Group, values: dict[str, Any]) -> tuple[str, str]:
    return raised(lambda: run(values, {"seed": dist.get_rank()}, {}))


def wrong_sizes(group: Group, values: dict[str, Any]) -> tuple[str, str]:
    return raised(lambda: run(values, {}, {"shard": 3}))


def broken(group: Group, values: dict[str, Any]) -> list[str]:
    return [each["path"] for each in run(values, {}, {})["broken_clips"]]


def adapters(group: Group, values: dict[str, Any]) -> dict[str, Any]:
    """Adapters under FSDP2: trained as by one process, continued, beside weights that stay."""
    runs: list[Any] = []
    original = loop._Run.train
    before: dict[str, torch.Tensor] = {}

    def watched(this: Any, *rest: Any) -> Any:
        runs.append(this)
        before.update({n: local(p).clone() for n, p in this.task.model.named_parameters() if not p.requires_grad})
        return original(this, *rest)

    output = Path(values["output"])
    with mock.patch.object(loop._Run, "train", watched):
        run(values, {"output": str(output / "many"), "training": {"steps": 1}}, {})
        run(values, {"output": str(output / "many")}, {})
        one = {"training": {"accumulation": 4, "steps": 1}}
        on_rank_0(lambda: run(values, {"output": str(output / "one first"), **one}, None)["step"])
        run(values, {"output": str(output / "one first")}, {})
        run(values, {"output": str(output / "one last"), "training": {"steps": 1}}, {})
    model, state = runs[-1].task.model, runs[-1].optimizer.full_state()
    found: dict[str, Any] = {
        "frozen": all(torch.equal(local(p), before[n]) for n, p in model.named_parameters() if not p.requires_grad),
        "only adapters have state": all("lora_" in name for name in state) and len(state) > 4,
    }
    for name in ("one", "one last"):
        on_rank_0(
            lambda n=name: run(values, {"output": str(output / n), "training": {"accumulation": 4}}, None)["step"]
        )
    for name in ("many", "one first", "one last"):
        for part in ("model", "ema"):
            files = [output / n / "step_00000002" / part / "adapter_model.safetensors" for n in (name, "one")]
            found[f"{name} {part}"] = difference(*files)
        both = zip(losses(output / name), losses(output / "one"), strict=True)
        found[f"{name} loss"] = max(abs(a - b) for a, b in both)
    dist.barrier()
    return found
