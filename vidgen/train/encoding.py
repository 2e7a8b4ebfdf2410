# SPDX-License-Identifier: Apache-2.0
"""Who encodes which clips and captions, and when: the order of a replica's micro-batches over its processes and time.

The processes of one replica need the same samples. So rank r of the M of them reads and encodes every M-th micro-batch
alone, from r on, and all of them exchange what came out (encoder data parallelism). With an interval of n each encodes
n micro-batches at once, and VAE and text encoders lie on the host while the n * M micro-steps run (interleaved
offload).

Videos do not travel: who reads one also makes the conditions that the system shows its transformer of it.

Draws of a micro-step come from its own generator, whose state travels with the batch, so that every loss is what it
would be if each process encoded everything. Nothing of this is saved: a resumed run encodes again from the number of
its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks
from .tasks import Task

Batch = dict[str, Any]
SeedOf = Callable[[int, int, int], int]  # (seed of the run, step, micro-step) to the seed of the draws


def micro_batches(task: Task, ranks: Ranks, step: int, seed_of: SeedOf) -> Iterator[Batch]:
    """The micro-batches of this process's replica from the one after ``step`` on. All processes of the run call this.

    Raises:
        ValueError: as `Task.samples`, on all processes.
    """
    if task.cache is not None and ranks.size > 1:
        ranks.together(partial(task.fill_cache, ranks.rank, ranks.size))
    if task.cache is not None:
        ranks.together(task.remember)
    options = task.recipe.encoders
    crew = ranks.of_replica() if options.data_parallel else Ranks()
    if task.encodes and (crew.size > 1 or options.interval is not None):
        return _encoded(task, ranks, crew, step, seed_of)
    accumulation, batch = task.recipe.training.accumulation, task.recipe.training.batch_size
    first = (step * accumulation * ranks.data_ranks + ranks.data_rank) * batch
    return task.samples(first, stride=ranks.data_ranks)


def _encoded(task: Any, ranks: Ranks, crew: Ranks, step: int, seed_of: SeedOf) -> Iterator[Batch]:
    recipe, interval = task.recipe, task.recipe.encoders.interval
    accumulation = recipe.training.accumulation
    begin, end = step * accumulation, recipe.training.steps * accumulation  # counted in the replica
    own = (begin + crew.rank) * ranks.data_ranks + ranks.data_rank
    samples = task.samples(own * recipe.training.batch_size, stride=ranks.data_ranks * crew.size)

    def encode(numbers: range) -> list[Batch]:
        batches = []
        for number in numbers:
            micro_step = number % accumulation * ranks.data_ranks + ranks.data_rank
            seed = seed_of(recipe.seed, number // accumulation + 1, micro_step)
            batches.append(task.encode(next(samples), torch.Generator().manual_seed(seed)))
        return batches

    while begin < end:
        stop = min(begin + (interval or 1) * crew.size, end)
        if interval is not None:
            task.move_encoders(task.device)
        mine = crew.together(partial(encode, range(begin + crew.rank, stop, crew.size)))
        if interval is not None:
            task.move_encoders(torch.device("cpu"))
        rounds = exchange(mine, crew, task.device)
        for number in range(begin, stop):
            yield rounds[(number - begin) % crew.size].pop(0)
        begin = stop


def exchange(batches: list[Batch], ranks: Ranks, device: torch.device) -> list[list[Batch]]:
    """The batches of every rank, on every rank. Numbers of batches, names and shapes may differ.

    Tensors lie on the host before and after; between, the bytes of one rank after the other pass ``device``.
    """
    if ranks.size == 1:
        return [batches]
    everyone = ranks.gather([_describe(batch) for batch in batches])
    return [
        batches if rank == ranks.rank else _unpacked(flat.cpu(), everyone[rank])
        for rank, flat in enumerate(_travel(batches, everyone, ranks, device))
    ]


Description = tuple[list[tuple[str, torch.dtype, torch.Size]], Batch]


def _describe(batch: Batch) -> Description:
    """Names, dtypes and shapes of the tensors of a batch, and what else is in it."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in batch.items() if name not in tensors}
    return [(name, t.dtype, t.shape) for name, t in tensors.items()], others


def _travel(
    batches: list[Batch], everyone: list[list[Description]], ranks: Ranks, device: torch.device
) -> Iterator[Tensor]:
    """The bytes of all tensors of one rank after the other, on each rank."""
    assert ranks.group is not None
    for rank, described in enumerate(everyone):
        count = sum(shape.numel() * dtype.itemsize for entries, _ in described for _, dtype, shape in entries)
        if count == 0:  # there are fewer batches left than ranks
            yield torch.empty(0, dtype=torch.uint8)
            continue
        if rank == ranks.rank:
            tensors = [t for batch in batches for t in batch.values() if isinstance(t, Tensor)]
            flat = torch.cat([t.contiguous().flatten().view(torch.uint8) for t in tensors]).to(device)
        else:
            flat = torch.empty(count, dtype=torch.uint8, device=device)
        dist.broadcast(flat, dist.get_global_rank(ranks.group, rank), group=ranks.group)
        yield flat


def _unpacked(flat: Tensor, described: list[Description]) -> list[Batch]:
    batches, begin = [], 0
    for entries, others in described:
        batch = dict(others)
        for name, dtype, shape in entries:
            part = flat[begin : begin + shape.numel() * dtype.itemsize]
            begin += len(part)
            batch[name] = part.clone().view(dtype).view(shape)  # of its own, so that it is aligned and freed alone
        batches.append(batch)
    return batches
