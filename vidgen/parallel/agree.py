# SPDX-License-Identifier: Apache-2.0
"""What one process finds wrong is raised on all of them: a process that raised alone would leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def together(
    function: Callable[[], T], group: dist.ProcessGroup | None, error: type[Exception] = ValueError
) -> list[T]:
    """Call ``function`` on every process of ``group``; the values of all, in the order of ranks.

    All processes of the group call this; ``group`` is one of CPU tensors (gloo), or None for this process alone.

    Args:
        function: what it returns must be pickled. Whatever Exception it raises anywhere is raised everywhere.
        error: the type that is raised, with the rank and the words of each that failed.
    """
    mine: tuple[T | None, str | None] = None, None
    try:
        mine = function(), None
    except Exception as problem:
        mine = None, str(problem) or type(problem).__name__
        if group is None:
            raise error(mine[1]) from problem
    if group is None:
        return [mine[0]]  # type: ignore[list-item]
    all_of_them: list[tuple[T, str | None]] = [None] * dist.get_world_size(group)  # type: ignore[list-item]
    dist.all_gather_object(all_of_them, mine, group=group)
    texts: dict[str, list[int]] = {}
    for rank, (_, text) in enumerate(all_of_them):
        if text is not None:
            texts.setdefault(text, []).append(rank)
    if texts:
        raise error("; ".join(_with_ranks(text, ranks, len(all_of_them)) for text, ranks in texts.items()))
    return [value for value, _ in all_of_them]


def _with_ranks(text: str, ranks: list[int], world: int) -> str:
    if len(ranks) == world:
        return text
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}: {text}"


def all_true(value: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether ``value`` is true on every process of a group of CPU tensors."""
    if group is None:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag)
