# SPDX-License-Identifier: Apache-2.0
"""Pipelines on processes of the pool, each compared with the whole model in one process."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from attention_cases import difference
from layouts import make_layout
from tiny import make_inputs, make_model
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as shards

from vidgen.parallel import Layout, Parallel
from vidgen.parallel import pipeline as pipelines
from vidgen.parallel.context import spread
from vidgen.parallel.pipeline import Call, Pipeline
from vidgen.parallel.pipeline_stages import keep_steps, own_chunks
from vidgen.parallel.sharding import fsdp_modules, local, shard_model
from vidgen.parallel.tensor import row_order, tensor_parallel, usual_order
from vidgen.train import loop
from vidgen.train.recipe import load_recipe

Group = dist.ProcessGroup
# Blocks are 4 in all but Open-Sora Plan 1.5, where three stages have two each and skips join the outer ones.
CHANGES: dict[str, dict[str, Any]] = {"cogvideox": {"num_layers": 4}, "opensora_plan_v1_3": {"num_layers": 4}}


def own_part(whole: Any, layout: Layout, parallel: Parallel) -> Any:
    """A copy of the model with the steps of this rank alone."""
    part = tensor_parallel(copy.deepcopy(whole), layout)
    keep_steps(part, own_chunks(whole, layout, parallel))
    return part


def loss_of(output: Tensor, number: int) -> Tensor:
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(number))
    return (output - target).square().mean()


def steps(
    group: Group,
    system: str,
    members: int,
    parallel: dict[str, Any],
    *,
    micro_batches: int = 3,
    frames: tuple[int, ...] = (2,),
    recompute: bool = False,
    fsdp: bool = False,
    preset: str | None = None,
    changes: dict[str, Any] | None = None,
    buckets: int = 8,
) -> dict[str, Any] | None:
    """Largest differences of losses, outputs and gradients, over steps of so many latent frames each; and the share of
    the model's parameters that this rank holds."""
    # One gloo group serves all lists of stages and schedules of the same sizes.
    sizes = {name: size for name, size in parallel.items() if name not in ("stages", "schedule")}
    layout, section = make_layout(members, **sizes), Parallel(**parallel)
    if layout is None:
        return None
    whole = make_model(system, preset, **(CHANGES.get(system, {}) if changes is None else changes))
    own = own_part(whole, layout, section)
    spread(own, layout)
    if fsdp:
        shard_model(own, layout, reshard_after_forward=False)
    whole.gradient_checkpointing = own.gradient_checkpointing = recompute
    pipeline = Pipeline(own, layout, section)
    found: dict[str, Any] = {"loss": 0.0, "output": 0.0}
    data, replica = layout.size("data"), layout.rank("data")
    for step, length in enumerate(frames):
        seeds = [100 * step + m for m in range(micro_batches * data)]
        inputs = [make_inputs(whole, (length, 4, 6), batch=2, text=5, seed=seed) for seed in seeds]
        wanted = [whole(**arguments) for arguments in inputs]
        losses = [loss_of(output, seed) for output, seed in zip(wanted, seeds, strict=True)]
        (torch.stack(losses).sum() / len(seeds)).backward()

        mine = [m * data + replica for m in range(micro_batches)]
        seen: dict[int, float] = {}

        def loss(number: int, output: Tensor) -> Tensor:
            m = mine[number]  # noqa: B023
            value = loss_of(output, seeds[m])  # noqa: B023
            seen[m] = abs(float((value - losses[m]).detach()))  # noqa: B023
            found["output"] = max(found["output"], difference(output.detach(), wanted[m].detach()))  # noqa: B023
            return value / len(seeds) / layout.size("sequence")  # noqa: B023

        with (
            mock.patch.object(pipelines, "MAX_BUCKETS", buckets),
            mock.patch.object(shards, "foreach_reduce", wraps=shards.foreach_reduce) as reduced,
        ):
            pipeline.step([Call((), inputs[m]) for m in mine], loss)
        # Once for each module in shards, whatever the number of micro-batches.
        assert reduced.call_count <= len(list(fsdp_modules(own))), reduced.call_count
        assert bool(reduced.call_count) is fsdp
        last = layout.rank("pipeline") == layout.size("pipeline") - 1
        assert sorted(seen) == (sorted(mine) if last else []), seen
        found["loss"] = max(found["loss"], *seen.values(), 0.0)
        for name, error in gradient_errors(whole, own, layout).items():
            found[name] = max(found.get(name, 0.0), error)
        for p in (*whole.parameters(), *own.parameters()):
            p.grad = None
    found["bytes"] = sum(local(p).nbytes for p in own.parameters()) / sum(p.nbytes for p in whole.parameters())
    found["names"] = [name for name, _ in own.named_parameters()]
    assert len(pipeline.buckets) == min(buckets, len(set(frames)))
    found["all"] = [name for name, _ in whole.named_parameters()]
    return found


def gradient_errors(whole: Any, own: Any, layout: Layout) -> dict[str, float]:
    """Of the parameters that this rank holds, relative to the largest of each, or to that of all."""
    names, orders = dict(whole.named_parameters()), row_order(own)
    largest = max(p.grad.abs().max().item() for p in names.values() if p.grad is not None)
    errors = {}
    for name, p in own.named_parameters():
        wanted, got = names[name].grad, p.grad
        assert (wanted is None) == (got is None), name
        if wanted is not None:
            if hasattr(got, "full_tensor"):
                got = usual_order(got.full_tensor(), orders.get(name))
            elif layout.size("sequence") > 1:
                dist.all_reduce(got, group=layout.group("sequence"))
            errors[name] = difference(got, wanted) / max(wanted.abs().max().item(), 0.01 * largest)
    return errors


def train(
    group: Group, values: dict[str, Any], output: str, parallel: dict[str, Any], first: dict[str, Any]
) -> dict[str, Any]:
    """A run of all processes, with ``first`` one that ends early and goes on; what of its report is the same on all."""
    layout = make_layout(4, **{name: size for name, size in parallel.items() if name != "stages"})
    values = {**values, "output": output, "parallel": vars(Parallel(**parallel))}
    for training in [first, {}] if first else [{}]:
        report = loop.train(load_recipe({**values, "training": {**values["training"], **training}}), layout=layout)
    dist.barrier()
    return {key: report[key] for key in ("finished", "step", "parameters", "skipped_steps")}


def refusals(group: Group) -> list[str]:
    """What is raised for steps that must not begin, and after them a step that works."""
    sizes: dict[str, Any] = {"pipeline": 2, "shard": 2}
    layout, section = make_layout(4, **sizes), Parallel(**sizes, stages=[[1, 1], [1, 1]])
    assert layout is not None
    whole = make_model("opensora_plan_v1_3", num_layers=4)
    pipeline = Pipeline(own_part(whole, layout, section), layout, section)

    def call(frames: int = 2, channels: int | None = None) -> Call:
        inputs = make_inputs(whole, (frames, 4, 6), batch=1, text=5)
        if channels is not None:
            inputs["hidden_states"] = inputs["hidden_states"][:, :channels]
        return Call((), inputs)

    stage = layout.rank("pipeline")
    steps = [
        [call(2 + stage), call(2 + stage)],
        [call(2), call(3 if layout.rank("world") == 1 else 2)],
        [call(channels=1 if layout.rank("world") == 2 else None)],
        [call() for _ in range(5)],
        [],
    ]
    found = []
    for calls in steps:
        try:
            pipeline.step(calls, lambda number, output: loss_of(output, number))
        except ValueError as error:
            found.append(str(error))
    assert not any(p.grad is not None for p in pipeline.model.parameters())
    pipeline.step([call(), call()], lambda number, output: loss_of(output, number))
    assert all(p.grad is not None for p in pipeline.model.parameters())
    return found
