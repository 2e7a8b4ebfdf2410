# SPDX-License-Identifier: Apache-2.0
"""How long a training step takes, by formula, from what it takes of each process and stated figures of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .cost import (
    GRADIENT_BYTES,
    Shares,
    Sizes,
    Stage,
    exchange_bytes,
    memory_of,
    sent_bytes,
    sharding_bytes,
    stages_of,
)
from .facts import ModelFacts, Step
from .layout import Parallel

ATTENTION_BACKWARD = 2.5  # of the forward pass's arithmetic: five products for two, the scores being computed again


@dataclass(frozen=True)
class Machine:
    """Stated figures of a cluster; the defaults are eight H100 SXM in a node. What is called measured stands in
    ``benchmarks/results/``, and ``benchmarks/scaling.py`` compares it with these numbers.

    Attributes:
        linear_flops, attention_flops: FLOP/s of a forward pass of Open-Sora Plan 1.5 in linear layers, with everything
            between them, and in attention. Measured.
        ring_flops: of attention to one block of keys, with its log-sum-exp, in both directions: plain PyTorch in
            float32 where no kernel is. Assumed: half of 67e12 (H100 datasheet).
        memory_bytes: of a device.
        node: devices that are joined by the fast links.
        link: bytes per second that a device sends inside its node. Assumed: 80 % of 450e9 (NVLink, H100 datasheet).
        network: the same to other nodes. Assumed: 80 % of 50e9, an adapter for each device (DGX H100 datasheet).
        latency: seconds of an exchange, however little it carries. Assumed.
    """

    name: str = "H100 SXM, 8 to a node"
    linear_flops: float = 600e12
    attention_flops: float = 575e12
    ring_flops: float = 33e12
    memory_bytes: float = 80e9
    node: int = 8
    link: float = 360e9
    network: float = 40e9
    latency: float = 20e-6


def machine_with(
    *,
    device_memory: float | None = None,
    tflops: float | None = None,
    node: int | None = None,
    link: float | None = None,
    network: float | None = None,
) -> Machine:
    """The default machine with other figures: GB, TFLOP/s in everything, devices, GB/s and GB/s.

    Raises:
        ValueError: a figure is not positive.
    """
    given = {"device_memory": device_memory, "tflops": tflops, "node": node, "link": link, "network": network}
    if wrong := [
        f"{name} must be positive, got {value}" for name, value in given.items() if not (value is None or value > 0)
    ]:
        raise ValueError(f"plan: {'; '.join(wrong)}")
    changes: dict[str, Any] = {}
    if tflops is not None:
        changes |= dict.fromkeys(("linear_flops", "attention_flops", "ring_flops"), tflops * 1e12)
    scaled = {"memory_bytes": device_memory, "link": link, "network": network}
    changes |= {name: value * 1e9 for name, value in scaled.items() if value is not None}
    changes |= {} if node is None else {"node": node}
    return replace(Machine(), **changes | ({"name": "a machine with the given figures"} if changes else {}))


@dataclass(frozen=True)
class Group:
    """Processes that exchange something: how many, how many numbers lie between neighbours, how many share a node."""

    size: int
    stride: int
    node: int

    @property
    def together(self) -> int:
        return max(1, min(self.size, self.node // self.stride))

    def collective(self, sent: float, machine: Machine) -> float:
        """Seconds of a gather, scatter or sum in which each rank sends so many bytes around a ring. All devices of a
        node that are in the group share the way out of it."""
        if self.size == 1:
            return 0.0
        whole = self.together == self.size
        speed = machine.link if whole else min(machine.link, self.together * machine.network)
        return machine.latency + sent / speed

    def all_to_all(self, sent: float, machine: Machine) -> float:
        """Seconds in which each rank sends so many bytes, the same to each other one."""
        if self.size == 1:
            return 0.0
        outside = (self.size - self.together) / (self.size - 1)
        return machine.latency + max(sent * (1 - outside) / machine.link, sent * outside / machine.network)

    def hop(self, sent: float, machine: Machine) -> float:
        """Seconds in which each rank sends so many bytes to the next."""
        if self.size == 1:
            return 0.0
        return machine.latency + sent / (machine.link if self.together == self.size else machine.network)


@dataclass(frozen=True)
class Groups:
    """The groups of a rank, as far as their exchanges cost time."""

    tensor: Group
    ulysses: Group
    ring: Group
    context: Group
    fsdp: Group
    replicate: Group
    pipeline: Group

    @classmethod
    def of(cls, parallel: Parallel, sizes: Sizes, node: int) -> Groups:
        tensor, ulysses, ring, shard = (sizes[name] for name in ("tensor", "ulysses", "ring", "shard"))
        context, replicate = ulysses * ring, sizes["replicate"]
        inner = parallel.order == "ulysses_inner"
        return cls(
            tensor=Group(tensor, 1, node),
            ulysses=Group(ulysses, tensor if inner else tensor * ring, node),
            ring=Group(ring, tensor * ulysses if inner else tensor, node),
            context=Group(context, tensor, node),
            fsdp=Group(shard * context, tensor, node),
            replicate=Group(replicate, tensor * context * shard, node),
            pipeline=Group(sizes["pipeline"], tensor * context * shard * replicate, node),
        )


def block_seconds(
    facts: ModelFacts, step: Step, shares: Shares, groups: Groups, machine: Machine
) -> tuple[float, float, dict[str, float]]:
    """Of one micro-step of one block: forward and backward computation, and exchange that nothing hides, by mechanism.

    A ring's exchange hides behind attention; that of Ulysses, of tensor parallelism and of moving groups does not.
    """
    batch, again = facts.batch, 1 if facts.recomputed else 0
    frozen = 0 if not step.parameters else 1 - step.trainable / step.parameters
    linear = batch * shares.of(step.linear) / shares.tensor / machine.linear_flops
    speed = machine.ring_flops if shares.parallel.ring > 1 else machine.attention_flops
    attention = batch * step.attention * shares.attention(step) / speed
    attention_back = ATTENTION_BACKWARD * attention
    forward, backward = linear + attention, (2 - frozen) * linear + attention_back
    shown: dict[str, float] = {}
    for name, (ahead, back) in exchange_bytes(facts, shares, step).items():
        passes = [batch * ahead] * (1 + again) + [batch * back]
        if name == "ring":
            hidden = [attention] * (1 + again) + [attention_back]
            times = [max(0.0, groups.ring.hop(n, machine) - h) for n, h in zip(passes, hidden, strict=True)]
        elif name == "tensor":
            times = [groups.tensor.all_to_all(n, machine) for n in passes]
        else:
            group = groups.ulysses if name == "ulysses" else groups.context
            times = [group.all_to_all(n, machine) for n in passes]
        shown[name] = sum(times)
    return forward, backward + again * forward, shown


def stage_seconds(facts: ModelFacts, stage: Stage, shares: Shares, sizes: Sizes, machine: Machine) -> dict[str, float]:
    """Of one micro-step of a stage. Parameters are gathered and gradients summed while blocks compute."""
    parallel = shares.parallel
    groups, found = Groups.of(parallel, sizes, machine.node), {"compute": 0.0, "shards": 0.0}
    for step, count in stage.all:
        forward, backward, shown = block_seconds(facts, step, shares, groups, machine)
        found["compute"] += count * (forward + backward)
        for name, seconds in shown.items():
            found[name] = found.get(name, 0.0) + count * seconds
        if parallel.pipeline > 1:  # once a step, see `step_seconds`
            continue
        gather, reduce = shard_seconds(facts, step, shares, groups, machine)
        again, busy = gather if parallel.reshard_after_forward else 0.0, sum(shown.values()) / 2
        late = max(0.0, gather - forward - busy) + max(0.0, again + reduce - backward - busy)
        found["shards"] += count * late
    return found


def shard_seconds(
    facts: ModelFacts, step: Step, shares: Shares, groups: Groups, machine: Machine
) -> tuple[float, float]:
    """Of gathering a block's parameters, and of adding up its gradients over the shards."""
    away = (groups.fsdp.size - 1) / groups.fsdp.size
    parameters, trainable = (step.local(n, shares.tensor) for n in (step.parameters, step.trainable))
    return (
        groups.fsdp.collective(away * parameters * facts.element, machine),
        groups.fsdp.collective(away * trainable * GRADIENT_BYTES, machine),
    )


def step_seconds(
    facts: ModelFacts, stages: Sequence[Stage], shares: Shares, sizes: Sizes, micro: int, machine: Machine
) -> dict[str, float]:
    """Of one step of the optimizer, by what is computed or waited for; a pipeline goes at its slowest stage's pace.

    With P stages, m micro-batches and v virtual stages the pipeline is idle for (P - 1) / v micro-batches.
    """
    parallel, groups = shares.parallel, Groups.of(shares.parallel, sizes, machine.node)
    each = max((stage_seconds(facts, stage, shares, sizes, machine) for stage in stages), key=lambda s: sum(s.values()))
    found = {name: micro * seconds for name, seconds in each.items()}
    if parallel.pipeline > 1:
        virtual = len(parallel.stage_rows) or 1
        found["bubble"] = (parallel.pipeline - 1) / virtual * sum(each.values())
        found["shards"] = max(
            sum(count * sum(shard_seconds(facts, step, shares, groups, machine)) for step, count in stage.all)
            for stage in stages
        )
        payload = facts.batch * shares.between(facts.stream)
        found["pipeline"] = 2 * (micro + parallel.pipeline - 1) * virtual * groups.pipeline.hop(payload, machine)
    once = max((sharding_bytes(facts, stage, shares, sizes, micro) for stage in stages), key=lambda b: sum(b.values()))
    replicas = [once[name] for name in ("sum over replicas", "gather from replicas")]
    if found_replicas := sum(groups.replicate.collective(sent, machine) for sent in replicas if sent):
        found["replicas"] = found_replicas
    if tensor := once.get("sum over tensor", 0.0):
        found["tensor"] = found.get("tensor", 0.0) + groups.tensor.collective(tensor, machine)
    return found


@dataclass
class Cost:
    """Of one combination. Bytes of ``memory`` and ``sent`` (a step of the optimizer), and ``seconds``, by what they are
    for; a step takes the sum of ``seconds``."""

    parallel: Parallel
    sizes: Sizes
    accumulation: int
    samples: int
    memory: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> float:
        return sum(self.sent.values())

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.step_s


def different_stages(facts: ModelFacts, parallel: Parallel) -> list[Stage]:
    """Of stages with the same steps the first, which has most micro-batches under way."""
    found: dict[tuple[object, ...], Stage] = {}
    for stage in stages_of(facts, parallel):
        key = (*((id(step), count) for step, count in stage.all), *stage.streams)
        found.setdefault(key, stage)
    return list(found.values())


def cost(facts: ModelFacts, parallel: Parallel, world: int, machine: Machine, accumulation: int | None = None) -> Cost:
    """What a legal combination costs. ``accumulation``: micro-steps of a step, by default those of the facts.

    Raises:
        ValueError: the sizes do not fit the number of processes.
    """
    sizes, micro = parallel.sizes(world), accumulation or facts.accumulation
    shares, stages = Shares(facts, parallel), different_stages(facts, parallel)
    memories = [memory_of(facts, stage, shares, sizes, micro) for stage in stages]
    found = Cost(parallel, sizes, micro, sizes["replicate"] * sizes["shard"] * micro * facts.batch)
    found.memory = max(memories, key=lambda memory: sum(memory.values()))
    found.sent = max(
        (sent_bytes(facts, stage, shares, sizes, micro) for stage in stages), key=lambda sent: sum(sent.values())
    )
    found.seconds = step_seconds(facts, stages, shares, sizes, micro, machine)
    return found
