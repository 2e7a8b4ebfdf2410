# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/scaling.md: what Open-Sora Plan 1.5 at 121 x 576 x 1024 would take on many devices, by formula.

    python benchmarks/scaling.py            # prints the computed tables; --write puts them into the page
    python benchmarks/scaling.py --step --device cuda --output benchmarks/results

The second form measures what the formulas say of one device: time and memory of the forward and backward pass of a few
blocks of the released model, as it trains, against the planner's numbers.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vidgen.parallel import Parallel
from vidgen.parallel.cost import GRADIENT_BYTES, MASTER_BYTES, Shares, exchange_bytes, stages_of
from vidgen.parallel.facts import ModelFacts, ModelShape
from vidgen.parallel.plan import gb, search
from vidgen.parallel.timing import Cost, Machine, cost
from vidgen.train.facts import facts_of
from vidgen.train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RECIPE = ROOT / "configs" / "opensora_plan_v1_5" / "t2v_8b.yaml"
MODELS = {"dense": ["--model.sparse1d", "false"], "Skiparse": []}
WORLDS = (8, 64, 512)
FORWARD = ROOT / "benchmarks" / "results" / "nvidia_h100_80gb_hbm3_models.csv"
STEP_COLUMNS = ("case", "blocks", "seconds", "formula_s", "memory_gb", "formula_gb")


@cache
def facts(model: str) -> ModelFacts:
    return facts_of(load_recipe(str(RECIPE), MODELS[model]))


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def layout(c: Cost) -> str:
    sizes = {name: size for name, size in c.sizes.items() if size > 1}
    text = " x ".join(f"{name} {size}" for name, size in sizes.items()) or "alone"
    return text + (", groups" if c.parallel.skiparse == "groups" else "")


# Figures


def figures_table() -> str:
    """What was measured of a device, and what the planner takes; the formulas' FLOPs over the measured seconds."""
    with FORWARD.open() as file:
        measured = {row["case"]: row for row in csv.DictReader(file)}
    rows = []
    for name in MODELS:
        steps = (facts(name).before, *facts(name).blocks, facts(name).after)
        linear, attention = sum(s.linear.whole for s in steps), sum(s.attention for s in steps)
        whole, part = (float(measured[name][column]) for column in ("forward_s", "attention_s"))
        for what, flops, seconds in (("attention", attention, part), ("all else", linear, whole - part)):
            rows.append([name, what, f"{seconds:.3f}", f"{flops / 1e12:.0f}", f"{flops / seconds / 1e12:.0f}"])
    return table(("model", "part", "measured s", "computed TFLOP", "TFLOP/s"), rows)


def machine_table() -> str:
    m = Machine()
    rows = [
        ["linear layers and all between", f"{m.linear_flops / 1e12:.0f} TFLOP/s", "mean of the table above, rounded"],
        ["attention", f"{m.attention_flops / 1e12:.0f} TFLOP/s", "mean of the table above, rounded"],
        [
            "attention in a ring",
            f"{m.ring_flops / 1e12:.0f} TFLOP/s",
            "assumed: plain PyTorch in float32, at half of the datasheet's 67 TFLOP/s; no kernel for it on CUDA yet",
        ],
        ["memory", f"{m.memory_bytes / 1e9:.0f} GB", "H100 datasheet"],
        ["inside a node of 8", f"{m.link / 1e9:.0f} GB/s", "assumed: 80 % of NVLink's 450 GB/s each way (datasheet)"],
        [
            "to other nodes",
            f"{m.network / 1e9:.0f} GB/s",
            "assumed: 80 % of a 400 Gbit/s adapter for each device (DGX H100 datasheet)",
        ],
        ["an exchange, at least", f"{m.latency * 1e6:.0f} us", "assumed"],
    ]
    return table(("figure", "value", "where it comes from"), rows)


# Projections


@cache
def best(name: str, world: int, samples: int) -> Cost:
    found = search(facts(name), world, Machine(), samples=samples).best
    assert found is not None
    return found


def projection(samples: Callable[[int], int]) -> str:
    head = ("devices", "model", "best by the formulas", "samples a step", "GB a device", "sent GB", "step s")
    rows = []
    for name in MODELS:
        first = None
        for world in WORLDS:
            c = best(name, world, samples(world))
            first = first or c.samples_per_s / world
            speed = c.samples_per_s / world / first
            cells = [gb(c.memory_bytes), gb(c.sent_bytes), f"{c.step_s:.2f}", f"{c.samples_per_s:.2f}", f"{speed:.0%}"]
            rows.append([str(world), name, layout(c), str(c.samples), *cells])
    return table((*head, "samples/s", "efficiency"), rows)


def strong_table() -> str:
    return projection(lambda world: 64)


def weak_table() -> str:
    return projection(lambda world: world)


def one_sample_table() -> str:
    """One sample over the devices of a sequence; efficiency is against the same model on one device."""
    rows = []
    for name in MODELS:
        alone = compute_alone(facts(name))
        for ranks in (2, 4, 8, 16, 24):
            ways = {
                "Ulysses": Parallel(ulysses=ranks, shard=1),
                "groups": Parallel(ulysses=ranks, shard=1, skiparse="groups"),
                "tensor": Parallel(tensor=ranks, shard=1),
            }
            cells = []
            for way, parallel in ways.items():
                legal = not (way == "groups" and name == "dense") and not (way == "tensor" and 24 % ranks)
                c = cost(facts(name), parallel, ranks, Machine(), 1) if legal else None
                cells.append(f"{c.step_s:.2f}, {alone / ranks / c.step_s:.0%}" if c is not None else "-")
            rows.append([name, str(ranks), *cells])
    return table(("model", "devices", "Ulysses: step s, efficiency", "groups", "tensor"), rows)


def compute_alone(some: ModelFacts) -> float:
    return cost(some, Parallel(), 1, Machine(), 1).seconds["compute"]


def traffic_table() -> str:
    """Bytes of one sample's forward and backward pass with blocks recomputed, by mode, on 8 devices."""
    rows = []
    for name in MODELS:
        for way, parallel in {
            "Ulysses 8": Parallel(ulysses=8, shard=1),
            "ring 8": Parallel(ring=8, shard=1),
            "Ulysses 4 x ring 2": Parallel(ulysses=4, ring=2, shard=1),
            "groups 8": Parallel(ulysses=8, shard=1, skiparse="groups"),
            "tensor 8": Parallel(tensor=8, shard=1),
            "tensor 4 x Ulysses 2": Parallel(tensor=4, ulysses=2, shard=1),
        }.items():
            if parallel.skiparse == "groups" and name == "dense":
                continue
            some = facts(name)
            (stage,) = stages_of(some, parallel)
            ahead = back = 0.0
            for step, count in stage.all:
                for forward, backward in exchange_bytes(some, Shares(some, parallel), step).values():
                    ahead, back = ahead + count * forward, back + count * backward
            rows.append([name, way, f"{ahead / 1e9:.2f}", f"{back / 1e9:.2f}", f"{(2 * ahead + back) / 1e9:.2f}"])
    return table(("model", "mode", "forward GB", "backward GB", "step with blocks recomputed GB"), rows)


def long_sequence_efficiency(tokens: int, ulysses: int, ring: int) -> float:
    """Of one dense sample of so many tokens, forward, in Ulysses x ring on one node, against one device."""
    some, part = facts("dense"), tokens / facts("dense").shape.tokens
    blocks = tuple(
        replace(
            block,
            linear=replace(block.linear, video=block.linear.video * part),
            attention=block.attention * part**2,
            joins=replace(block.joins, video=block.joins.video * part),
        )
        for block in some.blocks
    )
    long = replace(some, shape=ModelShape(some.shape.heads, len(blocks), tokens), blocks=blocks, recomputed=False)
    alone = cost(long, Parallel(), 1, Machine(), 1).seconds["compute"]
    together = cost(long, Parallel(ulysses=ulysses, ring=ring, shard=1), ulysses * ring, Machine(), 1)
    waits = together.seconds["compute"] + together.seconds.get("ulysses", 0.0) + together.seconds.get("ring", 0.0)
    return alone / (ulysses * ring) / waits


def bars_table() -> str:
    some, shards, replicas = facts("Skiparse"), 8, 8
    world = shards * replicas
    ours = cost(some, Parallel(replicate=replicas), world, Machine(), 1).memory
    states = sum(ours[name] for name in ("parameters", "gradients", "optimizer"))
    count = some.parameters
    layerzero = (MASTER_BYTES + GRADIENT_BYTES) * count / shards + 4 * some.states * count / world
    with FORWARD.open() as file:
        seconds = {row["case"]: float(row["forward_s"]) for row in csv.DictReader(file)}
    gain = seconds["dense"] / seconds["Skiparse"] - 1
    step = compute_alone(facts("dense")) / compute_alone(some) - 1
    rows = [
        [
            "(a) 8 ranks of Ulysses keep 75 % at 64k tokens inside a node",
            f"computed: {long_sequence_efficiency(65_536, 8, 1):.0%}",
            "nobody had 8 devices",
        ],
        [
            "the same of xDiT's 118,800 tokens on 8 H100, as a check of the formulas",
            f"computed: {long_sequence_efficiency(118_800, 8, 1):.0%}",
            "published: 70 %",
        ],
        [
            "(b) the ring's error in bfloat16 does not grow with it, at most 1.2 times dense",
            "-",
            "[measured](context_parallel.md#the-ring-in-numbers) on a CPU: 0.7 times dense for 2 to 16 ranks",
        ],
        [
            "(c) HSDP holds as little as layerzero: 8 replicas of 8 shards",
            f"computed: {gb(states)} GB of states, layerzero's rule {gb(layerzero)} GB",
            "the optimizer's shards over replicas equal one process in tests",
        ],
        [
            "(d) Skiparse at least 35 % faster than dense at 121 x 576 x 1024",
            f"computed: a training step {step:.0%} faster",
            f"measured on an H100: a forward pass {gain:.0%} faster",
        ],
    ]
    return table(("bar", "computed", "measured"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "figures": figures_table,
    "machine": machine_table,
    "strong": strong_table,
    "weak": weak_table,
    "one": one_sample_table,
    "traffic": traffic_table,
    "bars": bars_table,
}


def write(page: str, name: str, content: str) -> str:
    """The page with another table between its marks."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{content}\n{m[2]}", page, flags=re.S)


# One device


def measure_step(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Forward and backward of a model with a few blocks of each kind, with and without recomputation."""
    import time

    from device_timing import Watch
    from measure import device_name

    from vidgen import device as devices
    from vidgen.train.recipe import SYSTEMS, model_class, model_config
    from vidgen.train.tracing import WithoutInitializing

    device, rows = devices.resolve(arguments.device), []
    few = ["--model.num_layers", "[2,2,2]", "--model.sparse_n", "[1,4,1]"]
    for name, changes in {**MODELS, "Skiparse, blocks recomputed": []}.items():
        recomputed = str(name.endswith("recomputed")).lower()
        given = [*changes, *few, "--training.activation_checkpointing", recomputed]
        recipe = load_recipe(str(arguments.recipe), [*given, *arguments.overrides])
        some, config = facts_of(recipe), model_config(recipe)
        with torch.device("meta"), WithoutInitializing():
            model: Any = model_class(recipe)(config)
        model = model.to(torch.bfloat16).to_empty(device=device).train()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.02)
        model.gradient_checkpointing = some.recomputed
        latent = ((recipe.data.num_frames - 1) // 8 + 1, recipe.data.height // 8, recipe.data.width // 8)
        inputs = SYSTEMS[recipe.system].arguments(config, latent, recipe.text.t5_max_length)
        inputs = {key: torch.randn_like(t).to(device, torch.bfloat16) for key, t in inputs.items()}
        seconds, watch = [], Watch(device)
        if watch.module is not None:
            watch.module.reset_peak_memory_stats()
        for _ in range(arguments.repeats + 1):
            model.zero_grad(set_to_none=False)
            devices.synchronize(device)
            begin = time.perf_counter()
            out = model(**inputs)
            out.backward(torch.ones_like(out))
            devices.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        found = cost(some, Parallel(), 1, Machine(), 1)
        held = 2 * some.element * some.parameters  # weights and gradients, both in bfloat16 here
        formula = held + found.memory["activations"] + found.memory["working"]
        rows.append(
            {
                "case": name,
                "blocks": str(len(some.blocks)),
                "seconds": f"{min(seconds[1:]):.3f}",
                "formula_s": f"{found.seconds['compute']:.3f}",
                "memory_gb": f"{devices.peak_memory_bytes(device) / 1e9:.1f}",
                "formula_gb": f"{formula / 1e9:.1f}",
                "device": device_name(device),
                "torch": torch.__version__,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
        del model, inputs, out
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    parser.add_argument("--step", action="store_true", help="measure a step of one device instead")
    parser.add_argument("--device", default="auto", help="cpu, cuda or npu (default: the best that is there)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="of --step, YAML or JSON")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes of each case; the fastest counts")
    parser.add_argument("--output", type=Path, help="folder for csv and table")
    arguments, arguments_rest = parser.parse_known_args()
    arguments.overrides = arguments_rest
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.step:
        import report

        rows = measure_step(arguments)
        if arguments.output:
            report.write_table(rows, STEP_COLUMNS, arguments.output / report.file_name(rows[0], "_step.csv"))
        print(report.table(rows, STEP_COLUMNS))
        return
    page = PAGE.read_text()
    for name, make in TABLES.items():
        content = make()
        print(f"{content}\n")
        page = write(page, name, content)
    if arguments.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
