# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the trainer on processes of the pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

from vidgen.parallel import Layout, Parallel
from vidgen.train import loop
from vidgen.train.metrics import read_metrics
from vidgen.train.recipe import load_recipe

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
    return loop.train(recipe, layout=Layout.create(section))


def losses(folder: str | Path) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(folder) / "metrics.jsonl")]


def difference(one: Path, other: Path) -> float:
    """The largest between the tensors of two files."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def compare(group: Group, values: dict[str, Any], parallel: dict[str, Any], **changes: Any) -> dict[str, float]:
    """Differences of losses, weights and averages between a run of many processes and one of one process."""
    layout = Layout.create(Parallel(**parallel))
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
    dist.barrier()
    return found
