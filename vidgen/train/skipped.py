# SPDX-License-Identifier: Apache-2.0
"""Steps that were skipped because something was not finite: kept, and repeated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import config
from vidgen import device as devices
from vidgen.checkpoints.distributed import describe_model, write_model_folder
from vidgen.checkpoints.lazy import Lazy
from vidgen.io import read_json, write_json
from vidgen.parallel.sharding import Order, gather, local

from .gradient_clipping import gradient_norm
from .ranks import Ranks
from .recipe import Recipe
from .steps import step_seed
from .tasks import Task, build_task


def dump(
    folder: Path,
    task: Task,
    ranks: Ranks,
    orders: Mapping[str, Order],
    facts: dict[str, Any],
    batches: dict[int, dict[str, Any]],
) -> None:
    """Keep what :func:`replay` needs: each replica writes its batches, the first process the rest. All call this.

    Args:
        orders: see :func:`vidgen.parallel.sharding.gather`.
        facts: of the step, for JSON.
        batches: of this replica, by number of the micro-step.
    """
    replica = f".{ranks.data_rank}" if ranks.data_ranks > 1 else ""
    writes = ranks.is_first_of_replica
    others = ranks.together(lambda: save_batches(folder, f"batch{replica}.safetensors", batches) if writes else {})
    bad = [name for name, p in task.model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    everywhere = ranks.gather((bad, others))
    weights = None if ranks.layout is None else gather(task.model.state_dict(), ranks.layout, orders)
    rest = {number: other for _, part in everywhere for number, other in part.items()}

    def write() -> None:
        if weights is None:
            task.save(folder / "model")
        else:
            state = {n: Lazy(tuple(t.shape), t.dtype, partial(weights.__getitem__, n)) for n, t in weights.items()}
            write_model_folder(folder / "model", state, describe_model(task.model))
        config.save(task.recipe, folder / "config.yaml")
        not_finite = list(dict.fromkeys(name for names, _ in everywhere for name in names))
        write_json(
            folder / "step.json", {**facts, "not_finite": not_finite, "batches": [rest[n] for n in sorted(rest)]}
        )

    ranks.on_first(write)


def save_batches(folder: Path, name: str, batches: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Write the tensors of batches by number of the micro-step; what else is in them, by the same number."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    others: dict[int, dict[str, Any]] = {}
    for number, batch in batches.items():
        kept = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        tensors |= {f"{number}.{key}": value.contiguous().cpu() for key, value in kept.items()}
        others[number] = {key: value for key, value in batch.items() if key not in kept}
    save_file(tensors, folder / name)
    return others


def replay(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Repeat a skipped step from its dump (``skipped/step_*``): its batch, its weights, its draws.

    Args:
        recipe: of the run; data and encoders must still be there.
        folder: the dump.

    Returns:
        Loss and gradient norm, and the parameters whose gradient is not finite, as text and lists for JSON.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    facts = read_json(folder / "step.json")
    task = build_task(recipe, devices.resolve(recipe.device), weights=folder / "model")
    tensors = {key: t for file in folder.glob("batch*.safetensors") for key, t in load_file(file).items()}
    loss = 0.0
    for micro_step, rest in enumerate(facts["batches"]):
        prefix = f"{micro_step}."
        batch = {**rest, **{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}}
        generator = torch.Generator().manual_seed(step_seed(recipe.seed, facts["step"], micro_step))
        value, _ = task.loss(batch, generator)
        (value / len(facts["batches"])).backward()
        loss += float(value.detach()) / len(facts["batches"])
    gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    return {
        "step": facts["step"],
        "reason": facts["reason"],
        "loss": str(loss),
        "grad_norm": str(gradient_norm(list(gradients.values()))),
        "not_finite": [name for name, grad in gradients.items() if not is_finite(grad)],
    }


def is_finite(t: Tensor) -> bool:
    return bool(torch.isfinite(local(t)).all())
