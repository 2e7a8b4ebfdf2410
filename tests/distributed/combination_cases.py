# SPDX-License-Identifier: Apache-2.0
"""The whole trainer on a transformer of a system: processes of the pool against one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from layouts import layout_of
from safetensors.torch import load_file
from tiny import make_inputs, make_model
from torch import Tensor
from trainer_cases import losses, on_rank_0

from vidgen.checkpoints.distributed import EMA, OPTIMIZER, Distributed
from vidgen.parallel import Parallel
from vidgen.train import loop
from vidgen.train.recipe import Clipping, Data, Optimizer, Recipe, Training
from vidgen.train.tasks import Task, build_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = 3
# Enough heads and blocks for every way to cut them.
SIZES: dict[str, dict[str, Any]] = {
    "opensora_plan_v1_3": {"num_attention_heads": 4},
    "opensora_plan_v1_5": {"num_heads": 4},
    "opensora_v2": {"num_heads": 4, "hidden_size": 64},
    "cogvideox": {"num_attention_heads": 4, "num_layers": 4},
}


class _Clips:
    """As much of a dataset as the loop asks for."""

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return 1

    def note_replaced(self, notes: list[str]) -> None:
        assert not notes


class Drawn(Task):
    """A transformer learns to return what is drawn: two samples a micro-step, masked where the model takes masks."""

    def __init__(self, recipe: Recipe, device: torch.device, weights: Path | None, build: Any = None) -> None:
        self.recipe, self.device, self.dtype = recipe, device, torch.float32
        self.model = (build or build_model)(recipe, device, self.dtype, weights).train()
        self.dataset: Any = _Clips()
        self.cache = None

    def samples(self, start: int, stride: int = 1) -> Iterator[dict[str, Any]]:
        number = start // self.recipe.training.batch_size
        while True:
            yield {"number": number}
            number += stride

    def encode(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return batch

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = make_inputs(self.model, seed=batch["number"])
        target = torch.randn(inputs.get("img", inputs.get("hidden_states")).shape, generator=generator)
        output = self.model(**inputs)
        return (output - target[:, : output.shape[1]]).square().mean(), {}


def recipe_of(system: str, folder: Path, output: str, accumulation: int) -> Recipe:
    return Recipe(
        task="dit",
        output=folder / output,
        data=Data(folder, 1, 8, 8),
        training=Training(STEPS, batch_size=2, accumulation=accumulation, precision="fp32", log_every=100),
        system=system,
        model={"pretrained": folder / "weights"},
        # A large eps: a gradient of rounding errors is not to become a step of full length.
        optimizer=Optimizer(lr=0.01, eps=1e-2, ema_decay=0.9),
        clipping=Clipping("norm", max_norm=0.5),
        device="cpu",
    )


@mock.patch.object(loop, "build_task", Drawn)
def compare(
    group: dist.ProcessGroup, system: str, parallel: dict[str, Any], folder: Path, accumulation: int = 1
) -> dict[str, float]:
    """Largest differences after three optimizer steps: of the losses, of the weights and their averages, of the
    gradients' running mean (relative to its largest element), and of the output with these weights."""
    section = Parallel(**parallel)
    model = make_model(system, **SIZES[system])
    on_rank_0(lambda: model.save_pretrained(folder / "weights"))
    recipe = recipe_of(system, folder, "many", accumulation)
    recipe.parallel = section
    layout = layout_of(section)
    loop.train(recipe, layout=layout)

    def alone() -> dict[str, float]:
        loop.train(recipe_of(system, folder, "one", accumulation * layout.size("data")))
        return differences(model, folder)

    found: dict[str, float] = on_rank_0(alone)
    return found


def differences(model: Any, folder: Path) -> dict[str, float]:
    checkpoint = f"step_{STEPS:08d}"
    many, one = folder / "many" / checkpoint, folder / "one" / checkpoint
    found = {"loss": max(abs(a - b) for a, b in zip(losses(many.parent), losses(one.parent), strict=True))}
    names = [name for name, _ in model.named_parameters()]
    moments = load_file(one / "optimizer.safetensors")
    shards = Distributed(many)
    means = {i: moments[f"{i}.exp_avg"] for i in range(len(names))}
    largest = max(float(mean.abs().max()) for mean in means.values())
    errors = [
        float((shards.lazy(f"{OPTIMIZER}{name}/exp_avg").load() - means[i]).abs().max()) for i, name in enumerate(names)
    ]
    found["gradients"] = max(errors) / largest
    assert shards.lazy(f"{OPTIMIZER}{names[0]}{EMA}").shape == tuple(means[0].shape)
    outputs = []
    for part in ("model", "ema"):
        states = [load_file(run / part / WEIGHTS) for run in (many, one)]
        assert states[0].keys() == states[1].keys()
        found["weights" if part == "model" else "average"] = max(
            float((states[0][name] - states[1][name]).abs().max()) for name in states[0]
        )
        if part == "model":
            for state in states:
                model.load_state_dict(state)
                with torch.no_grad():
                    outputs.append(model(**make_inputs(model, seed=99)))
    found["output"] = float((outputs[0] - outputs[1]).abs().max())
    moved = load_file(folder / "weights" / WEIGHTS)
    found["moved"] = max(float((states[1][name] - moved[name]).abs().max()) for name in moved)
    return found
