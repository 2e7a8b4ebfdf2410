# SPDX-License-Identifier: Apache-2.0
"""What a training step takes of each process, by formula: bytes that it sends, bytes that it holds.

All of it is arithmetic on what was read off a model (:class:`ModelFacts`). ``docs/scaling.md`` says which formulas were
compared with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vidgen.ops import context_parallel as cp

from .facts import Amount, ModelFacts, Step
from .layout import Parallel
from .pipeline_stages import all_chunks

Sizes = dict[str, int]  # of every dimension of a layout

GRADIENT_BYTES = MASTER_BYTES = 4  # float32


class Shares:
    """How the tokens of one sample lie on a combination's processes: fractions of the busiest one."""

    def __init__(self, facts: ModelFacts, parallel: Parallel) -> None:
        self.facts, self.parallel = facts, parallel
        self.context, self.tensor = parallel.context, parallel.tensor
        shape = facts.shape
        self.groups = parallel.skiparse == "groups" and self.context > 1
        multiple = cp.skiparse_multiple(shape.ratios) if parallel.ring > 1 else 1
        self.video = 1.0
        if self.context > 1 and shape.tokens:
            self.video = max(cp.shard_sizes(shape.tokens, self.context, multiple)) / shape.tokens
        self.text_spread = facts.spread_text and not self.groups
        self.text = 1 / self.context if self.text_spread else 1.0
        self.heads = max(1, shape.heads // self.tensor)

    def of(self, amount: Amount) -> float:
        """What one context rank has of something."""
        return amount.part(self.video, self.text)

    def between(self, amount: Amount) -> float:
        """What one rank has of it where tensor parallelism spreads tokens, channels or copies of weights."""
        return amount.part(self.video / self.tensor, self.text / self.tensor, 1 / self.tensor)

    def attention(self, step: Step) -> float:
        """The fraction of a block's attention that its busiest rank computes; heads need not divide evenly."""
        ulysses, ring = self.parallel.ulysses, self.parallel.ring
        if self.groups and step.ratio > 1:
            groups = cp.Groups(0, step.ratio, step.pattern, self.context)
            share = math.ceil(step.ratio / groups.cells) / step.ratio
            return share * math.ceil(self.heads / groups.ulysses) / self.heads
        return math.ceil(self.heads / ulysses) / self.heads / ring / self.tensor


# Stages


@dataclass(frozen=True)
class Stage:
    """Blocks of a pipeline stage, alike ones together with their number, and what of the ends it computes.

    ``streams`` are what it sends to others: what its chunks pass on, and gradients of what they are given.
    """

    blocks: tuple[tuple[Step, int], ...]
    ends: tuple[Step, ...]
    number: int = 0
    streams: tuple[Amount, ...] = ()

    @property
    def all(self) -> Iterable[tuple[Step, int]]:
        return (*self.blocks, *((step, 1) for step in self.ends))


def stages_of(facts: ModelFacts, parallel: Parallel) -> list[Stage]:
    if not facts.blocks:
        return [Stage((), (facts.before,))]
    streams = [facts.before.stream, *(block.stream for block in facts.blocks)]  # in front of each block, and at the end
    chunks, found = all_chunks(len(facts.blocks), parallel), []
    for number in range(parallel.pipeline):
        counts: dict[int, int] = {}
        own = chunks[number :: parallel.pipeline]
        for kind in (facts.kinds[i] for chunk in own for i in chunk.blocks):
            counts[kind] = counts.get(kind, 0) + 1
        ends = [facts.before] * own[0].first + [facts.after] * own[-1].last
        given = [streams[chunk.blocks.start] for chunk in own if not chunk.first]
        passed = [streams[chunk.blocks.stop] for chunk in own if not chunk.last]
        blocks = tuple((facts.blocks[kind], n) for kind, n in counts.items())
        found.append(Stage(blocks, tuple(ends), number, (*given, *passed)))
    return found


def in_flight(stage: int, stages: int, virtual: int, micro: int, schedule: str) -> float:
    """Micro-batches whose activations a stage holds at once, counted in whole stages."""
    if stages == 1:
        return 1
    if schedule == "gpipe":
        return micro
    if virtual == 1:
        return min(stages - stage, micro)
    return min((2 * (stages - stage - 1) + (virtual - 1) * stages + 1) / virtual, micro)


# Bytes that a rank sends


def attention_bytes(facts: ModelFacts, shares: Shares, step: Step) -> dict[str, tuple[float, float]]:
    """Of one block's attention and one sample: bytes by mechanism, forward and backward."""
    parallel = shares.parallel
    if shares.context == 1 or step.text is None:
        return {}
    ulysses, ring, width = parallel.ulysses, parallel.ring, facts.width / shares.tensor
    tokens, text, tensors = facts.shape.tokens, step.text, 4 if step.answers else 2
    if shares.groups and step.ratio > 1:
        sent = cp.group_parallel_volume(tokens, width, ulysses, step.ratio, text if step.answers else 0)
        sent -= width * (ulysses - 1) / ulysses * tokens / ulysses  # that of the hidden states is told by `moves`
        return {"groups": (sent * facts.element, sent * facts.element)}
    found: dict[str, tuple[float, float]] = {}
    if ulysses > 1:
        of_text = tensors * text / ring / ulysses if shares.text_spread else text * step.answers
        sent = cp.ulysses_volume(tokens / ring, width, ulysses) + width * (ulysses - 1) / ulysses * of_text
        found["ulysses"] = (sent * facts.element, sent * facts.element)
    if ring > 1:
        # Backward keys and values go around again, and their gradients one hop further, in float32; keys and values of
        # text that is no part of the sequence are gathered.
        around = cp.ring_volume(tokens + text * step.joint, width / ulysses, ring)
        met = 0.0 if step.joint else 2 * width / ulysses * (ring - 1) / ring * text
        sent = (around + met) * facts.element
        found["ring"] = (sent, sent + around * ring / (ring - 1) * GRADIENT_BYTES)
    return found


def exchange_bytes(facts: ModelFacts, shares: Shares, step: Step) -> dict[str, tuple[float, float]]:
    """Of one block and one sample: bytes that a rank sends by mechanism, forward and backward.

    Tensor parallelism gathers tokens before the layers that it cuts and adds up results after them, and the other way
    around backward. Where whole groups lie on each rank, hidden states move between blocks.
    """
    found = attention_bytes(facts, shares, step)
    if shares.tensor > 1:
        sent = (shares.tensor - 1) / shares.tensor * (shares.of(step.gathers) + shares.of(step.scatters))
        found["tensor"] = (sent, sent)
    if shares.groups and step.moves.video:
        sent = (shares.context - 1) / shares.context * shares.video * step.moves.video
        found["moves"] = (sent, sent)
    if step.joins.video and (ranks := shares.context * shares.tensor) > 1:
        sent = (ranks - 1) * shares.between(step.joins)
        found["result"] = (sent, sent)
    return found


def sharding_bytes(facts: ModelFacts, stage: Stage, shares: Shares, sizes: Sizes, micro: int) -> dict[str, float]:
    """Of one step of the optimizer: parameters gathered and gradients summed, of a stage.

    Each micro-step gathers a block's parameters for its forward and, unless they stay, again for its backward pass, and
    adds up its gradients over the shards; over the replicas that happens once. Stages of a pipeline do both once a
    step. Parameters that the replicas stepped by parts are gathered from them.
    """
    parallel, tensor = shares.parallel, shares.tensor
    shards, replicas = sizes["shard"] * shares.context, sizes["replicate"]
    away, over = (shards - 1) / shards, (replicas - 1) / replicas
    blocks = sum(count * step.local(step.parameters, tensor) for step, count in stage.blocks)
    ends = sum(step.local(step.parameters, tensor) for step in stage.ends)
    trainable = sum(count * step.local(step.trainable, tensor) for step, count in stage.all)
    piped = parallel.pipeline > 1
    gathers = 1 if piped else micro * (2 if parallel.reshard_after_forward else 1)
    found = {
        "gather parameters": away * (gathers * blocks + (1 if piped else micro) * ends) * facts.element,
        "sum gradients": (1 if piped else micro) * away * trainable * GRADIENT_BYTES,
        "sum over replicas": 2 * over * trainable / shards * GRADIENT_BYTES,
        "gather from replicas": over * trainable / shards * MASTER_BYTES if parallel.shard_optimizer else 0.0,
    }
    if tensor > 1:
        whole = sum(count * (step.trainable - step.trainable_cut) for step, count in stage.all)
        found["sum over tensor"] = 2 * (tensor - 1) / tensor * whole / shards * GRADIENT_BYTES
    return found


def sent_bytes(facts: ModelFacts, stage: Stage, shares: Shares, sizes: Sizes, micro: int) -> dict[str, float]:
    """By mechanism, of one rank of a stage in one step of the optimizer."""
    found = {name: n for name, n in sharding_bytes(facts, stage, shares, sizes, micro).items() if n}
    passes = micro * facts.batch
    for step, count in stage.all:
        for name, (forward, backward) in exchange_bytes(facts, shares, step).items():
            sent = passes * count * (forward * (2 if facts.recomputed else 1) + backward)
            found[name] = found.get(name, 0.0) + sent
    if shares.parallel.pipeline > 1:
        found["pipeline"] = passes * sum(shares.between(stream) for stream in stage.streams)
    return found


# Memory


def memory_of(facts: ModelFacts, stage: Stage, shares: Shares, sizes: Sizes, micro: int) -> dict[str, float]:
    """Bytes of the busiest rank of a stage."""
    parallel, tensor = shares.parallel, shares.tensor
    shards = sizes["shard"] * shares.context
    parameters = sum(count * step.local(step.parameters, tensor) for step, count in stage.all)
    trainable = sum(count * step.local(step.trainable, tensor) for step, count in stage.all)
    blocks = [step.local(step.parameters, tensor) for step, _ in stage.blocks] or [0.0]
    ends = sum(step.local(step.parameters, tensor) for step in stage.ends)
    # A pipeline's stages hold whole parameters and gradients from the first backward pass to the last.
    piped = parallel.pipeline > 1
    stay = 2 * max(blocks) if parallel.reshard_after_forward and not piped else parameters - ends
    whole_gradients = GRADIENT_BYTES * trainable if piped and shards > 1 else 0.0
    on_device = 0.0 if parallel.cpu_offload else 1.0
    optimizer_ranks = shards * (sizes["replicate"] if parallel.shard_optimizer else 1)
    flights = in_flight(stage.number, parallel.pipeline, len(parallel.stage_rows) or 1, micro, parallel.schedule)
    return {
        "parameters": on_device * MASTER_BYTES * parameters / shards,
        "gradients": on_device * GRADIENT_BYTES * trainable / shards,
        "optimizer": on_device * 4 * facts.states * trainable / optimizer_ranks,
        # of one part also the gradients, in both precisions on their way to the shards
        "gathered": facts.element * (stay + ends)
        + (facts.element + GRADIENT_BYTES) * max(*blocks, ends)
        + whole_gradients,
        "activations": facts.batch * activation_bytes(facts, stage, shares, flights),
        "working": facts.batch * 2 * max(shares.between(step.widest) for step, _ in stage.all or ((Step(), 1),)),
        "inputs": facts.batch * facts.input_bytes,
        "encoders": facts.resident_bytes or 0.0,
    }


def activation_bytes(facts: ModelFacts, stage: Stage, shares: Shares, flights: float = 1) -> float:
    """What samples leave on a rank for the backward pass; of the ends that of one sample, whose turn it is."""
    ends = sum(shares.between(step.saved) for step in stage.ends)
    outside = sum(count * shares.between(step.outside) for step, count in stage.blocks)
    saved = [(saved_bytes(step, shares), count) for step, count in stage.blocks]
    if not facts.recomputed:
        return ends + flights * (outside + sum(count * n for n, count in saved))
    inputs = sum(count * shares.between(step.inputs) for step, count in stage.blocks)
    return ends + flights * (outside + inputs) + max((n for n, _ in saved), default=0.0)


def saved_bytes(step: Step, shares: Shares) -> float:
    """What one sample leaves on a rank between a block's forward and backward pass."""
    kept = shares.between(step.saved - step.gathered) + shares.of(step.gathered)
    if shares.context > 1 and step.text is not None:  # the result of attention, before and after its exchange
        facts = shares.facts
        kept += shares.video / shares.tensor * facts.shape.tokens * facts.width * facts.element
    return kept
