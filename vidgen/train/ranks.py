# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, and how they agree. In a run of one process every function here is the plain thing."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vidgen import device as devices
from vidgen.io import LockError
from vidgen.parallel import Layout, Parallel, launch

from .errors import TrainingStopped

T = TypeVar("T")

# What an error of another process is raised as here, so that all of them end with the same exit code.
ERRORS = (TrainingStopped, LockError, OSError, ImportError, FloatingPointError, ValueError)


class Ranks:
    """Who this process is among those of the run, and agreement between them.

    Agreement is over tensors on the host, so that it waits for no device.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout
        self.size = 1 if layout is None else layout.size("world")
        self.rank = 0 if layout is None else layout.rank("world")
        self.data_ranks = 1 if layout is None else layout.size("data")
        self.data_rank = 0 if layout is None else layout.rank("data")
        self.sequence_ranks = 1 if layout is None else layout.size("sequence")
        self.group = None if layout is None else layout.group("world")

    @property
    def members(self) -> list[int] | None:
        """Their numbers in the default process group; None: all of it."""
        if self.group is None or self.size == dist.get_world_size():
            return None
        return dist.get_process_group_ranks(self.group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a run writes once."""
        return self.rank == 0

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this process speaks for those that share its samples."""
        return self.layout is None or all(self.layout.rank(dim) == 0 for dim in ("pipeline", "sequence"))

    def of_replica(self) -> Ranks:
        """The ranks that share this one's samples, for agreement among them."""
        return self if self.layout is None else self.within(self.layout.group("model"))

    def within(self, group: dist.ProcessGroup) -> Ranks:
        """The ranks of a smaller group that this process is in, for agreement among them."""
        ranks = Ranks(self.layout)
        ranks.group, ranks.size, ranks.rank = group, dist.get_world_size(group), dist.get_rank(group)
        return ranks

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on some process."""
        if self.layout is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return [bool(value) for value in values.tolist()]

    def gather(self, value: T) -> list[T]:
        """What each process gave, on every process. Small things: they travel as pickles between our own processes."""
        if self.layout is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """``function()`` on every process. Where it raises on one, all raise.

        Raises:
            Exception: on the process itself what the function raised, on others the like with the number of the rank.
        """
        result, error = tried(function)
        (failed,) = self.any(error is not None)
        if failed:
            self.raise_together(error)
        return result  # type: ignore[return-value]

    def raise_together(self, error: Exception | None) -> None:
        """Raise ``error``, or what another process raises here; all processes call this, at least one with an error."""
        told = self.gather(None if error is None else (_kind(error), str(error)))
        if error is not None:
            raise error
        for rank, entry in enumerate(told):
            if entry is not None:
                raise ([*ERRORS, RuntimeError][entry[0]])(f"rank {rank}: {entry[1]}")

    def on_first(self, function: Callable[[], T]) -> T:
        """``function()`` on the first process alone; its result, or its error, on all."""
        result, error = tried(function) if self.is_first else (None, None)
        answers = self.gather((result, None if error is None else (_kind(error), str(error))))
        if error is not None:
            raise error
        result, told = answers[0]
        if told is not None:
            raise ([*ERRORS, RuntimeError][told[0]])(f"rank 0: {told[1]}")
        return result  # type: ignore[return-value]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over the samples of all replicas; the ranks of a replica have equal values."""
        if self.layout is None or not values:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64) / self.size
        dist.all_reduce(total, group=self.group)
        return dict(zip(values, total.tolist(), strict=True))


def tried(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a function returns, or raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _kind(error: Exception) -> int:
    return next((i for i, kind in enumerate(ERRORS) if isinstance(error, kind)), len(ERRORS))


def world_size() -> int:
    """Processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def join(
    parallel: Parallel | None, device_name: str, layout: Layout | None = None
) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of a run and this process's device; where the run is spread, the process group lives inside the block.

    A run is spread over processes where it is given a ``layout`` of a process group that is there already, the recipe
    has a section ``parallel``, or torchrun has started several processes.

    Raises:
        ValueError: the sizes do not fit the number of processes, or no such device is here.
    """
    if layout is not None:
        yield Ranks(layout), devices.resolve(device_name)
        return
    world = dist.get_world_size() if dist.is_initialized() else world_size()
    if parallel is None and (dist.is_initialized() or world == 1):
        yield Ranks(), devices.resolve(device_name)
        return
    parallel = parallel or Parallel()
    parallel.sizes(world)
    device = devices.of_process(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    started = not dist.is_initialized()
    if started:
        timeout = datetime.timedelta(seconds=parallel.timeout_s)
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        where = launch.meeting_place(timeout) if "RANK" in os.environ else alone
        dist.init_process_group(devices.communication_backends(device), timeout=timeout, **where)
    # After an error the group is left to the end of the process: others may hang in an exchange.
    yield Ranks(Layout.create(parallel, device.type)), device
    if started:
        dist.destroy_process_group()
