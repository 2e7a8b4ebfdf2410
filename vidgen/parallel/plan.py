# SPDX-License-Identifier: Apache-2.0
"""Which combinations of parallelism are legal for a model, and which of them is best by the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vidgen.ops import context_parallel as cp

from .facts import ModelFacts, ModelShape
from .layout import DIMS, Parallel
from .pipeline_stages import micro_batch_problems, stage_problems
from .timing import Cost, Machine, cost

ENCODERS_AWAY = "encoders.interval, which moves the VAE and the text encoders away"
LESS_MEMORY = {
    **dict.fromkeys(("activations", "working"), "more ring, ulysses, tensor or checkpointing"),
    "encoders": ENCODERS_AWAY,
}
USABLE = 0.92  # of a device's memory: the rest goes to the libraries and to fragments

# What the refused combinations of a search are counted under.
TOKENS, ADAPTERS, TENSOR, STAGES, GROUPS, IDLE, FEW, BATCH = (
    "a model without tokens",
    "adapters on layers that are cut or far away",
    "heads that do not divide",
    "stages without blocks",
    "groups that cannot be whole",
    "ranks without work",
    "fewer micro-batches than stages",
    "samples that do not divide",
)


def check(shape: ModelShape, parallel: Parallel, world: int, *, accumulation: int | None = None) -> list[str]:
    """Why a model cannot be trained so by so many processes, each with the nearest way that works; empty if it can.

    Args:
        shape: heads, blocks and Skiparse ratios of the model.
        accumulation: micro-steps of a step, which are the micro-batches of a pipeline; None: not known yet.
    """
    problems = [f"parallel.{problem}" for problem in parallel.validate()]
    if problems:
        return problems
    try:
        parallel.sizes(world)
    except ValueError as error:
        problems.append(str(error))
    return problems + [text for _, text in refusals(shape, parallel, accumulation)]


def refusals(shape: ModelShape, parallel: Parallel, accumulation: int | None = None) -> Iterator[tuple[str, str]]:
    """Kind and words of everything that is wrong between a model and a valid section."""
    if shape.heads == 0:
        spread = [name for name in ("ring", "ulysses", "tensor", "pipeline") if getattr(parallel, name) > 1]
        for name in spread:
            yield (
                TOKENS,
                f"parallel.{name} must be 1 for a model without tokens and blocks, got {getattr(parallel, name)}; "
                "nearest: shard and replicate alone",
            )
        return
    for name in ("tensor", "pipeline"):
        if shape.adapters and getattr(parallel, name) > 1:
            yield (
                ADAPTERS,
                f"parallel.{name} must be 1 where adapters are trained, got {getattr(parallel, name)}; nearest: shard",
            )
    if shape.heads % parallel.tensor:
        near = nearest_divisors(shape.heads, parallel.tensor)
        yield (
            TENSOR,
            f"parallel.tensor must divide the {shape.heads} heads, got {parallel.tensor}; nearest: {near}, or ulysses, "
            "which takes any number",
        )
    for problem in stage_problems(shape.blocks, parallel):
        yield STAGES, problem
    if parallel.skiparse == "groups" and set(shape.ratios) == {1}:
        yield (
            GROUPS,
            "parallel.skiparse='groups' is for models with Skiparse layers, this one has none; nearest: "
            "skiparse='heads'",
        )
    if accumulation is not None:
        for problem in micro_batch_problems(parallel, accumulation):
            yield FEW, problem


def warnings(shape: ModelShape, parallel: Parallel, *, accumulation: int | None = None) -> list[str]:
    """What is legal and wasteful."""
    return [text for _, text in wastes(shape, parallel, accumulation)]


def wastes(shape: ModelShape, parallel: Parallel, accumulation: int | None = None) -> Iterator[tuple[str, str]]:
    if shape.heads == 0:
        return
    heads = max(1, shape.heads // parallel.tensor)
    if parallel.skiparse == "heads" and parallel.ulysses > heads:
        near = nearest_factor(parallel.ulysses, heads)
        yield (
            IDLE,
            f"parallel.ulysses={parallel.ulysses} leaves {parallel.ulysses - heads} ranks without one of the {heads} "
            f"heads in attention; nearest without idle ranks: ulysses={near}, ring={parallel.context // near}",
        )
    multiple = cp.skiparse_multiple(shape.ratios) if parallel.ring > 1 else 1
    units = -(-shape.tokens // multiple)
    if parallel.context * parallel.tensor > units:
        what = f"{units} runs of {multiple}" if multiple > 1 else f"{units}"
        yield (
            IDLE,
            f"{parallel.context * parallel.tensor} ranks share {what} tokens, so that some have none; nearest: at most "
            f"{units} ranks a sequence",
        )
    if accumulation is not None and parallel.pipeline > 1 and accumulation < parallel.pipeline:
        idle = (parallel.pipeline - 1) / (parallel.pipeline - 1 + accumulation)
        yield (
            FEW,
            f"a pipeline of {parallel.pipeline} stages with {accumulation} micro-batches is idle for {idle:.0%} of the "
            f"time; nearest: training.accumulation={parallel.pipeline}",
        )


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of ``number`` on both sides of ``wanted``."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = max(n for n in divisors if n <= max(1, wanted)), [n for n in divisors if n > wanted]
    return f"{below} or {above[0]}" if above else f"{below}"


def nearest_factor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


# Search


@dataclass
class Plan:
    """All combinations of a search: those that fit a device's memory, fastest first, then the others, smallest first.

    ``refused`` counts the combinations that were not considered, by kind, with an example and its nearest legal way.
    ``given`` is what a recipe itself says, if it says something, with its problems, and with warnings.
    """

    facts: ModelFacts
    machine: Machine
    world: int
    costs: list[Cost]
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    given: Parallel | None = None
    given_cost: Cost | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def best(self) -> Cost | None:
        """The fastest one that fits."""
        return self.costs[0] if self.costs and self.fits(self.costs[0]) else None

    def fits(self, cost: Cost) -> bool:
        return cost.memory_bytes <= USABLE * self.machine.memory_bytes


def make_plan(
    facts: ModelFacts, world: int, machine: Machine, given: Parallel | None = None, samples: int | None = None
) -> Plan:
    """:func:`search`, and what becomes of the section ``parallel`` that a recipe already has."""
    plan = search(facts, world, machine, given, samples)
    if given is None:
        return plan
    plan.given, plan.problems = given, check(facts.shape, given, world, accumulation=facts.accumulation)
    if not plan.problems:
        accumulation, reason = micro_steps(facts, given, world, samples)
        plan.problems = [] if reason is None else [reason]
    if not plan.problems:
        plan.warnings = warnings(facts.shape, given, accumulation=accumulation)
        plan.given_cost = cost(facts, given, world, machine, accumulation)
    return plan


def search(
    facts: ModelFacts, world: int, machine: Machine, base: Parallel | None = None, samples: int | None = None
) -> Plan:
    """Every combination of the dimensions of a layout for ``world`` processes.

    Args:
        base: gives what is no size, such as ``cpu_offload``; sizes and stages are replaced.
        samples: of a step of the optimizer, to be kept whatever the combination: accumulation follows. None: each
            replica goes through what the recipe says.
    """
    found: list[Cost] = []
    refused: dict[str, tuple[int, str]] = {}
    for parallel in combinations(facts.shape, world, base or Parallel()):
        accumulation, reason = micro_steps(facts, parallel, world, samples)
        problems = [*refusals(facts.shape, parallel, accumulation), *wastes(facts.shape, parallel, accumulation)]
        problems += [] if reason is None else [(BATCH, reason)]
        if problems:
            kind, text = problems[0]
            refused[kind] = (refused.get(kind, (0, ""))[0] + 1, refused.get(kind, (0, text))[1])
        else:
            found.append(cost(facts, parallel, world, machine, accumulation))
    plan = Plan(facts, machine, world, found, refused)
    found.sort(key=lambda c: (0, 1 / c.samples_per_s) if plan.fits(c) else (1, c.memory_bytes))
    return plan


def combinations(shape: ModelShape, world: int, base: Parallel) -> Iterator[Parallel]:
    """All ordered factorizations of the number of processes, for a model without tokens those into two; pipelines with
    one chunk of blocks on each stage and with two."""
    kinds: list[Any] = ["heads", "groups"] if len(set(shape.ratios)) > 1 else ["heads"]
    spread = DIMS if shape.heads else ("replicate", "shard")
    for factors in factorizations(world, len(spread)):
        sizes: dict[str, Any] = dict.fromkeys(DIMS, 1) | dict(zip(spread, factors, strict=True))
        for skiparse in kinds:
            if skiparse == "groups" and (sizes["ring"] > 1 or sizes["tensor"] > 1 or sizes["ulysses"] == 1):
                continue
            for stages in stage_lists(shape, sizes["pipeline"], base.schedule):
                yield replace(base, **{**sizes, "skiparse": skiparse, "stages": stages, "window": 1})


def stage_lists(shape: ModelShape, pipeline: int, schedule: str) -> Iterator[list[list[int]]]:
    """Blocks divided evenly over the stages, and over two virtual stages of each where there are enough blocks."""
    yield []
    if pipeline > 1 and schedule == "1f1b" and shape.blocks >= 2 * pipeline:
        counts = list(cp.shard_sizes(shape.blocks, 2 * pipeline))
        yield [counts[:pipeline], counts[pipeline:]]


def factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        for rest in factorizations(number // first, parts - 1):
            yield (first, *rest)


def micro_steps(facts: ModelFacts, parallel: Parallel, world: int, samples: int | None) -> tuple[int, str | None]:
    """Micro-steps of a step, and why they are not a whole number, if they are not."""
    if samples is None:
        return facts.accumulation, None
    sizes = parallel.sizes(world)
    each = sizes["replicate"] * sizes["shard"] * facts.batch
    if samples % each:
        near = max(1, samples // each) * each
        return 1, f"{samples} samples of a step do not divide into {each} at once; nearest: {near} samples"
    return samples // each, None


# In words


def reason(plan: Plan, c: Cost) -> str:
    """Why a combination is where it is, in a line."""
    limit = plan.machine.memory_bytes
    if not plan.fits(c):
        largest = max(c.memory, key=lambda name: c.memory[name])
        less = LESS_MEMORY.get(largest, "more shard or tensor")
        return f"does not fit: {largest} takes {gb(c.memory[largest])} of {gb(limit)} GB; {less}"
    waits = {name: seconds for name, seconds in c.seconds.items() if name != "compute" and seconds > 0}
    if not waits or sum(waits.values()) < 0.02 * c.step_s:
        return "all but computes"
    worst = max(waits, key=lambda name: waits[name])
    words = {
        "bubble": "stages wait for each other",
        "shards": "parameters arrive late",
        "replicas": "gradients and parameters go over all replicas",
        "ulysses": "heads are exchanged",
        "groups": "cells of ranks share groups",
        "moves": "hidden states move",
        "result": "the result is gathered",
        "tensor": "tokens meet before and after each layer",
        "ring": "keys and values arrive late",
        "pipeline": "stages are far apart",
    }
    return f"{words[worst]} for {waits[worst] / c.step_s:.0%} of the time"


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}" if count < 1e11 else f"{count / 1e9:.0f}"


COLUMNS = (
    *DIMS,
    "skiparse",
    "samples",
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "other",
    "GB",
    "sent GB",
    "step s",
    "compute",
    "samples/s",
    "why",
)


def row(plan: Plan, c: Cost) -> dict[str, str]:
    """A line of the table; memory in GB a process, ``compute``: its share of the step."""
    named = ("parameters", "gradients", "optimizer", "activations")
    other = sum(n for name, n in c.memory.items() if name not in named)
    rows = len(c.parallel.stage_rows)  # of virtual stages
    return {
        **{name: str(c.sizes[name]) for name in DIMS},
        "pipeline": " x ".join([str(c.sizes["pipeline"]), *([str(rows)] if rows > 1 else [])]),
        "skiparse": c.parallel.skiparse if len(set(plan.facts.shape.ratios)) > 1 else "-",
        "samples": str(c.samples),
        **{name: gb(c.memory[name]) for name in named},
        "other": gb(other),
        "GB": gb(c.memory_bytes),
        "sent GB": gb(c.sent_bytes),
        "step s": f"{c.step_s:.3g}",
        "compute": f"{c.seconds['compute'] / c.step_s:.0%}",
        "samples/s": f"{c.samples_per_s:.3g}",
        "why": reason(plan, c),
    }


def table(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> str:
    """Columns aligned for a terminal."""
    widths = {name: max(len(name), *(len(r[name]) for r in rows)) for name in columns}
    lines = [[name.ljust(widths[name]) for name in columns]]
    lines += [[r[name].ljust(widths[name]) for name in columns] for r in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def text(plan: Plan, rows: int = 12) -> str:
    """The plan for a terminal."""
    facts, machine = plan.facts, plan.machine
    lines = [
        f"{facts.name}: {facts.parameters / 1e9:.2f} B parameters, {facts.shape.blocks} blocks, "
        f"{facts.shape.heads} heads, {facts.shape.tokens:,} + {facts.text} tokens",
        f"{plan.world} processes on {machine.name}, {gb(machine.memory_bytes)} GB each; all figures are computed, "
        "none is measured here (docs/scaling.md)",
        "",
    ]
    if facts.resident_bytes is None:
        lines[2:2] = ["the VAE and the text encoders are not counted: their safetensors are not here"]
    if plan.costs:
        lines += [table([row(plan, c) for c in plan.costs[:rows]], COLUMNS)]
        lines += [f"... and {len(plan.costs) - rows} more"] if len(plan.costs) > rows else []
    if plan.given_cost is not None:
        lines += ["", "the recipe's own:", table([row(plan, plan.given_cost)], COLUMNS)]
    lines += [f"the recipe's own: {problem}" for problem in (*plan.problems, *plan.warnings)]
    if plan.refused:
        lines += ["", "not considered:"]
        lines += [f"  {count} with {kind}, such as: {words}" for kind, (count, words) in plan.refused.items()]
    lines += ["", recommendation(plan)]
    return "\n".join(lines)


def recommendation(plan: Plan) -> str:
    best = plan.best
    if best is None:
        if not plan.costs:
            return "no combination is legal"
        smallest = plan.costs[0]
        more = [] if plan.facts.recomputed or not plan.facts.blocks else ["training.activation_checkpointing"]
        more += [] if smallest.parallel.cpu_offload else ["parallel.cpu_offload"]
        more += [ENCODERS_AWAY] if plan.facts.resident_bytes else []
        need = f"the smallest needs {gb(smallest.memory_bytes)} GB of a process"
        return f"no combination fits; {need}: {', '.join([*more, 'more processes'])}"
    lines = ["recommended:", "parallel:", *(f"  {name}: {value}" for name, value in section(best).items())]
    if best.accumulation != plan.facts.accumulation:
        lines += ["training:", f"  accumulation: {best.accumulation}"]
    return "\n".join(lines)


def section(c: Cost) -> dict[str, Any]:
    """What to write into a recipe."""
    sizes = {name: c.sizes[name] for name in DIMS if c.sizes[name] > 1 or name == "shard"}
    others = {"skiparse": c.parallel.skiparse if c.parallel.skiparse != "heads" else None, "stages": c.parallel.stages}
    return sizes | {name: value for name, value in others.items() if value}


def as_json(plan: Plan) -> dict[str, Any]:
    best = plan.best
    return {
        "model": plan.facts.name,
        "parameters": plan.facts.parameters,
        "shape": asdict(plan.facts.shape),
        "encoder_bytes": plan.facts.resident_bytes,  # None: not known, and not counted
        "world": plan.world,
        "machine": asdict(plan.machine),
        "recommended": None if best is None else {"parallel": section(best), "accumulation": best.accumulation},
        "given": plan.given_cost and cost_as_json(plan, plan.given_cost),
        "problems": plan.problems,
        "warnings": plan.warnings,
        "combinations": [cost_as_json(plan, c) for c in plan.costs],
        "refused": {kind: {"count": count, "example": words} for kind, (count, words) in plan.refused.items()},
    }


def cost_as_json(plan: Plan, c: Cost) -> dict[str, Any]:
    return {
        "sizes": c.sizes,
        "skiparse": c.parallel.skiparse,
        "stages": c.parallel.stages,
        "samples": c.samples,
        "accumulation": c.accumulation,
        "fits": plan.fits(c),
        "memory_bytes": {**c.memory, "all": c.memory_bytes},
        "sent_bytes": {**c.sent, "all": c.sent_bytes},
        "seconds": {**c.seconds, "all": c.step_s},
        "samples_per_s": c.samples_per_s,
        "why": reason(plan, c),
    }
