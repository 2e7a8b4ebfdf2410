# SPDX-License-Identifier: Apache-2.0
"""Which steps of a transformer lie on which stage of a pipeline.

A model is a row of steps: ``embed`` (number -1), its blocks, ``head`` (the number of blocks). A chunk is a run of them;
a stage has one chunk, or one in each row of virtual stages. Chunk ``v * pipeline + p`` of the whole row is on stage p.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from vidgen.ops import context_parallel as cp

from .layout import Layout, Parallel


@dataclass(frozen=True)
class Chunk:
    """Chunk ``number`` of ``count``: some consecutive blocks, the first with ``embed``, the last with ``head``."""

    number: int
    count: int
    blocks: range

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


def block_counts(blocks: int, parallel: Parallel) -> list[list[int]]:
    """Blocks of every stage, in a row for each virtual stage; where the section does not say, as even as possible."""
    return parallel.stage_rows or [list(cp.shard_sizes(blocks, parallel.pipeline))]


def all_chunks(blocks: int, parallel: Parallel) -> list[Chunk]:
    """The chunks of all stages in order.

    Raises:
        ValueError: the section ``parallel`` does not fit so many blocks.
    """
    if problems := stage_problems(blocks, parallel):
        raise ValueError("; ".join(problems))
    counts = [n for row in block_counts(blocks, parallel) for n in row]
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [
        Chunk(i, len(counts), range(begin, begin + n)) for i, (begin, n) in enumerate(zip(begins, counts, strict=True))
    ]


def own_chunks(model: Any, layout: Layout, parallel: Parallel) -> list[Chunk]:
    """The chunks of a model that this rank's stage has, one for each virtual stage.

    Raises:
        ValueError: the model has no blocks, or the section ``parallel`` does not fit them.
    """
    if not hasattr(model, "step_of"):
        raise ValueError(f"pipeline: model must be a transformer with `blocks`, got {type(model).__name__}")
    chunks = all_chunks(len(model.blocks), parallel)
    return [chunk for chunk in chunks if chunk.number % parallel.pipeline == layout.rank("pipeline")]


def stage_problems(blocks: int, parallel: Parallel) -> list[str]:
    """Why the blocks of a model cannot be divided so, each with the nearest way that works; empty if they can.

    A stage may be without blocks if it embeds or makes the output: every rank must have parameters.
    """
    rows, stages = parallel.stage_rows, parallel.pipeline
    if not rows:
        if stages <= blocks:
            return []
        return [
            f"parallel.pipeline must be at most the model's {blocks} blocks, got {stages}; nearest: pipeline={blocks}"
        ]
    if any(len(row) != stages for row in rows):
        return [f"parallel.stages must have pipeline={stages} numbers in each row, got {parallel.stages}"]
    near = _as_given(nearest_rows(blocks, rows), parallel)
    if (total := sum(map(sum, rows))) != blocks:
        return [f"parallel.stages must add up to the model's {blocks} blocks, got {total}; nearest: {near}"]
    if empty := _without_parameters(rows):
        return [f"parallel.stages must give stage {empty[0]} a block, got {parallel.stages}; nearest: {near}"]
    return []


def micro_batch_problems(parallel: Parallel, micro_batches: int) -> list[str]:
    """Why a schedule cannot take so many micro-batches, with the nearest number that works; empty if it can.

    Virtual stages take them in ``micro_batches // pipeline`` rounds of the same size.
    """
    rounds = max(1, micro_batches // parallel.pipeline)
    if len(parallel.stage_rows) < 2 or micro_batches % rounds == 0:
        return []
    down = next(n for n in range(micro_batches, 0, -1) if n % max(1, n // parallel.pipeline) == 0)
    up = next(n for n in range(micro_batches, 2 * micro_batches + 1) if n % (n // parallel.pipeline) == 0)
    return [
        f"training.accumulation must be a multiple of {rounds}, the rounds in which virtual stages of "
        f"pipeline={parallel.pipeline} take micro-batches, got {micro_batches}; nearest: {down} or {up}"
    ]


def nearest_rows(blocks: int, rows: list[list[int]]) -> list[list[int]]:
    """Rows that add up to ``blocks`` and leave no stage without parameters, with few blocks moved."""
    width, counts = len(rows[0]), [n for row in rows for n in row]
    while sum(counts) > blocks:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < blocks:
        counts[counts.index(min(counts))] += 1
    for stage in _without_parameters([counts[i : i + width] for i in range(0, len(counts), width)]):
        counts[counts.index(max(counts))] -= 1
        counts[stage] += 1
    return [counts[i : i + width] for i in range(0, len(counts), width)]


def _without_parameters(rows: list[list[int]]) -> list[int]:
    return [p for p in range(1, len(rows[0]) - 1) if not any(row[p] for row in rows)]


def _as_given(rows: list[list[int]], parallel: Parallel) -> list[Any]:
    return list(rows) if isinstance(parallel.stages[0], list) else rows[0]


def keep_steps(model: Any, chunks: Collection[Chunk]) -> None:
    """Take every parameter away that the steps of ``chunks`` do not need; the others keep their names.

    Args:
        model: one with ``blocks`` and ``step_of``, as all transformers of ``vidgen.models`` have; it may be on meta.
    """
    blocks = len(model.blocks)
    kept = {i for chunk in chunks for i in chunk.blocks}
    kept |= {-1 for chunk in chunks if chunk.first} | {blocks for chunk in chunks if chunk.last}
    for name, _ in list(model.named_parameters()):
        if model.step_of(name) not in kept:
            path, _, own = name.rpartition(".")
            module: nn.Module = model.get_submodule(path)
            module.register_parameter(own, None)
