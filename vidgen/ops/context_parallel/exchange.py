# SPDX-License-Identifier: Apache-2.0
"""The collectives of context parallelism, differentiable.

Each process's inputs are variables of its own and the loss is the sum over the processes: a gradient is the derivative
of that sum. A tensor that all processes hold alike so gets a part of its gradient on each, to be summed over the group
as data parallelism does for parameters.

All of them are one ``all_to_all_single`` of a flat buffer with split sizes, which gloo, nccl and hccl take for any
sizes (gloo's list form of all_to_all takes equal ones only), but for gathering equal shards, which needs no buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Placement, route

Shape = tuple[int, ...]
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # as older PyTorch calls it


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, sent: list[int], received: list[int], *pieces: Tensor) -> Tensor:
        ctx.group, ctx.sent, ctx.received, ctx.shapes = group, sent, received, [p.shape for p in pieces]
        flat = pieces[0].new_empty(sum(sent))
        for part, piece in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True):
            part.view(piece.shape).copy_(piece)
        arrived = flat.new_empty(sum(received))
        dist.all_to_all_single(arrived, flat, received, sent, group=group)
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        flat = grad.new_empty(sum(ctx.sent))
        dist.all_to_all_single(flat, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        parts = flat.split([math.prod(shape) for shape in ctx.shapes])
        return None, None, None, *(p.view(shape) for p, shape in zip(parts, ctx.shapes, strict=True))


def exchange(
    pieces: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Send ``pieces[i]`` to rank i and receive tensors of ``shapes[i]`` from it, all in one message a pair of ranks.

    Pieces share a dtype and a device; at least one must exist. Gradients travel the same way back.
    """
    if len(pieces) == 1:
        return [list(pieces[0])]
    sent = [sum(p.numel() for p in to) for to in pieces]
    numels = [[math.prod(shape) for shape in of] for of in shapes]
    flat = _Exchange.apply(group, sent, [sum(of) for of in numels], *(p for to in pieces for p in to))
    parts = iter(flat.split([n for of in numels for n in of]))
    return [[next(parts).view(shape) for shape in of] for of in shapes]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.rest = dim, sizes, group
        return joined(x, dim, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return summed(grad, *ctx.rest), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.rest = dim, sizes, group
        return summed(x, dim, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return joined(grad, *ctx.rest), None, None, None


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The shards of all ranks, ``sizes`` long, joined along ``dim``. Backward sums the gradients of every copy, in rank
    order and in float32, and rounds once."""
    return x if len(sizes) == 1 else _Gather.apply(x, dim, sizes, group)


def reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rank i gets its ``sizes[i]`` rows along ``dim`` of the sum over the ranks, which is taken in rank order and in
    float32 and rounded once. Backward gathers."""
    return x if len(sizes) == 1 else _ReduceScatter.apply(x, dim, sizes, group)


def all_reduce(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks; rank i adds up the ``sizes[i]`` rows of ``dim`` that are its own, in rank order and in
    float32. The result is the same on all ranks bit for bit, and in 16 bits it is rounded once."""
    return gather(reduce_scatter(x, dim, sizes, group), dim, sizes, group)


def joined(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    ranks, x = len(sizes), x.contiguous()
    if len(set(sizes)) == 1 and x.numel():
        arrived = x.new_empty(ranks, *x.shape)
        all_gather(arrived.view(-1), x.view(-1), group=group)
        return arrived.movedim(0, dim).flatten(dim, dim + 1)
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    numels = [math.prod(shape) for shape in shapes]
    arrived = x.new_empty(sum(numels))
    dist.all_to_all_single(arrived, x.flatten().repeat(ranks), numels, [x.numel()] * ranks, group=group)
    parts = zip(arrived.split(numels), shapes, strict=True)
    return torch.cat([part.view(shape) for part, shape in parts], dim)


def summed(x: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    ranks, rows = len(sizes), x.split(list(sizes), dim)
    own = rows[dist.get_rank(group)]
    arrived = x.new_empty(ranks, *own.shape)
    flat = torch.cat([part.flatten() for part in rows])
    dist.all_to_all_single(arrived.view(-1), flat, [own.numel()] * ranks, [part.numel() for part in rows], group=group)
    return sum_wide(arrived.unbind(0))


def sum_wide(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0] if parts[0].dtype == torch.float64 else parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Placement, target: Placement, group: dist.ProcessGroup) -> Tensor:
        ctx.source, ctx.target, ctx.group = source, target, group
        pick, sent, place, received = route_on(source, target, dist.get_rank(group), x.device)
        return move_rows(x, pick, sent, place, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = route_on(ctx.target, ctx.source, dist.get_rank(ctx.group), grad.device)
        return move_rows(grad, *back, ctx.group), None, None, None


def move_rows(
    x: Tensor, pick: Tensor, sent: list[int], place: Tensor, received: list[int], group: dist.ProcessGroup
) -> Tensor:
    rows = x.transpose(0, 1).index_select(0, pick)  # tokens outermost: a rank's share is one run of memory
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows, received, sent, group=group)
    return arrived.transpose(0, 1).index_select(1, place)


@lru_cache(maxsize=64)
def route_on(
    source: Placement, target: Placement, rank: int, device: torch.device
) -> tuple[Tensor, list[int], Tensor, list[int]]:
    pick, sent, place, received = route(source, target, rank)
    return pick.to(device), sent, place.to(device), received


def move(x: Tensor, source: Placement, target: Placement, group: dist.ProcessGroup) -> Tensor:
    """Rows ``(batch, tokens, ...)`` from one placement to another, in one exchange; none where they are equal."""
    return x if source == target else _Move.apply(x, source, target, group)
