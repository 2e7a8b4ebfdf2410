# SPDX-License-Identifier: Apache-2.0
"""Layouts of the first processes of the pool, made once: gloo keeps threads and sockets for each of their groups."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from attention_cases import GROUPS
from torch.distributed.device_mesh import DeviceMesh

from vidgen.parallel import Layout, Parallel
from vidgen.parallel.layout import DIMS, mesh_dims

TORCH, LOCAL = "torch.distributed", {"use_local_synchronization": True}


def layout_of(section: Parallel) -> Layout:
    """The layout of a section ``parallel`` over all processes of the pool."""
    sizes = {name: getattr(section, name) for name in (*DIMS, "order", "window")}
    layout = make_layout(dist.get_world_size(), **sizes)
    assert layout is not None
    return layout


def make_layout(members: int, **parallel: Any) -> Layout | None:
    """The layout of the first ``members`` processes, None on the others."""
    return _make(members, tuple(sorted(parallel.items()))) if dist.get_rank() < members else None


@cache
def _make(members: int, parallel: tuple[tuple[str, Any], ...]) -> Layout:
    section = Parallel(**dict(parallel))
    sizes, dims = section.sizes(members), mesh_dims(section.order)
    # A mesh makes its groups with all processes; here those that are none of its ranks do not take part. Then the
    # names of groups, which are counted, would differ between processes.
    new_group, numbers = dist.new_group, count()

    def name(ranks: list[int], use_hashed_name: bool) -> str:
        return f"{members} {parallel} {ranks} {next(numbers)}"

    def group_of(**each: Any) -> Any:
        if len(each["ranks"]) > 1:
            return new_group(**each | LOCAL)
        one = tuple(each["ranks"])  # most dimensions have one process, which needs no group of its own each time
        return GROUPS[one] if one[0] == dist.get_rank() else dist.GroupMember.NON_GROUP_MEMBER

    with (
        mock.patch(f"{TORCH}.device_mesh.new_group", group_of),
        mock.patch(f"{TORCH}.distributed_c10d._process_group_name", name),
    ):
        mesh = DeviceMesh("cpu", torch.arange(members).view([sizes[dim] for dim in dims]), mesh_dim_names=dims)
        return Layout(mesh, order=section.order, window=section.window)
