# SPDX-License-Identifier: Apache-2.0
"""Which process does what: pipeline x replicate x shard x ring x ulysses x tensor.

The number of a process grows fastest along ``tensor``, then ``ulysses``, ``ring``, ``shard``, ``replicate`` and
``pipeline``: Megatron's order, in which what talks most lies next to each other. ``order="ring_inner"`` swaps ring and
Ulysses, as MindSpeed-MM's FSDP2 trainer does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMS = ("pipeline", "replicate", "shard", "ring", "ulysses", "tensor")
Order = Literal["ulysses_inner", "ring_inner"]


@dataclass
class Parallel:
    """The section ``parallel`` of a recipe: how a run is spread over processes.

    The product of the sizes is the number of processes; ``shard`` takes what the others leave.

    ``batch_size`` samples go through each of the ``replicate * shard`` replicas at once. The processes of a replica,
    ``pipeline * ring * ulysses * tensor`` of them, share its samples.
    """

    shard: int | None = None  # FSDP2: parameters, gradients and optimizer are sharded; None: over all that is left
    replicate: int = 1  # copies of the sharded model (HSDP)
    ulysses: int = 1  # a sequence over processes, by heads inside attention
    ring: int = 1  # a sequence over processes, by blocks of keys inside attention
    tensor: int = 1  # rows and columns of weights, with sequence parallelism between them
    pipeline: int = 1  # consecutive blocks
    order: Order = "ulysses_inner"  # of the ranks of a sequence
    window: int = 1  # of a double ring: so many consecutive ranks of the ring are one window
    skiparse: Literal["heads", "groups"] = "heads"  # "groups": whole Skiparse groups on each rank instead of heads
    stages: list[Any] = field(default_factory=list)  # blocks of each stage, [11, 10, 11, 10]; rows are virtual stages
    schedule: Literal["1f1b", "gpipe"] = "1f1b"  # with virtual stages: interleaved 1f1b
    shard_optimizer: bool = True  # over the replicas too
    reshard_after_forward: bool = True  # False keeps a block's parameters until its backward pass, as pipelines do
    cpu_offload: bool = False  # parameters, gradients and optimizer live on the host
    timeout_s: float = 1800.0  # a step or an exchange that takes longer ends the run, with a report of who waits where

    def validate(self) -> list[str]:
        sizes = ("replicate", "ulysses", "ring", "tensor", "pipeline", "window")
        problems = [f"{name} must be positive, got {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if self.shard is not None and self.shard < 1:
            problems.append(f"shard must be positive or null, got {self.shard}")
        if self.timeout_s <= 0:
            problems.append(f"timeout_s must be positive, got {self.timeout_s}")
        if problems:
            return problems
        if self.ring % self.window:
            problems.append(f"window must divide ring={self.ring}, got {self.window}")
        if self.skiparse == "groups" and self.ring > 1:
            problems.append(f"skiparse='groups' goes with ulysses, not with ring={self.ring}; set ulysses instead")
        if self.skiparse == "groups" and self.tensor > 1:
            problems.append(
                f"skiparse='groups' keeps whole groups on a rank, which tensor={self.tensor} would cut; "
                "nearest: skiparse='heads', or shard instead of tensor"
            )
        rows = self.stage_rows
        if rows and any(len(row) != self.pipeline for row in rows):
            problems.append(f"stages must have pipeline={self.pipeline} numbers in each row, got {self.stages}")
        if any(not isinstance(n, int) or n < 0 for row in rows for n in row):
            problems.append(f"stages must be numbers of blocks, got {self.stages}")
        if len(rows) > 1 and self.schedule == "gpipe":
            problems.append("schedule 'gpipe' has no virtual stages; give stages one row, or use '1f1b'")
        return problems

    @property
    def stage_rows(self) -> list[list[int]]:
        """``stages`` as rows, one for each virtual stage; empty where the blocks are to be divided evenly."""
        if not self.stages:
            return []
        return [list(row) for row in self.stages] if isinstance(self.stages[0], list) else [list(self.stages)]

    @property
    def context(self) -> int:
        """Processes that a sequence is spread over for attention."""
        return self.ring * self.ulysses

    def sizes(self, world: int) -> dict[str, int]:
        """Size of every dimension for so many processes, by name in the order of ``DIMS``.

        Raises:
            ValueError: the product is not ``world``; the message names the nearest ``shard`` that fits.
        """
        rest = self.replicate * self.ring * self.ulysses * self.tensor * self.pipeline
        shard = self.shard if self.shard is not None else max(1, world // rest)
        if rest * shard != world:
            told = " x ".join(f"{name} {getattr(self, name)}" for name in DIMS if name != "shard")
            fits = (
                f"run {rest * max(1, round(world / rest))} processes" if world % rest else f"set shard={world // rest}"
            )
            raise ValueError(f"parallel: {told} x shard {shard} needs {rest * shard} processes, got {world}; {fits}")
        return {name: shard if name == "shard" else getattr(self, name) for name in DIMS}


class Layout:
    """The place of this process, and the groups that it talks to.

    Attributes:
        mesh: the DeviceMesh with the dimensions ``DIMS`` (with "ring_inner", ring and ulysses change places).
        sizes: size of every dimension.
        order, window: as in :class:`Parallel`.

    All groups are made by all processes together; a group of one process is a group all the same.
    """

    def __init__(self, mesh: DeviceMesh, *, order: Order = "ulysses_inner", window: int = 1) -> None:
        names = tuple(mesh.mesh_dim_names or ())
        if names != mesh_dims(order):
            raise ValueError(f"Layout: mesh must have the dimensions {mesh_dims(order)}, got {names}")
        self.mesh, self.order, self.window = mesh, order, window
        self.sizes = {name: mesh[name].size() for name in DIMS}
        inner = ("ring", "ulysses") if order == "ulysses_inner" else ("ulysses", "ring")
        self.context_mesh = flat(mesh, inner, "context")  # a sequence, for attention
        self.sequence_mesh = flat(mesh, (*inner, "tensor"), "sequence")  # a sequence, outside attention
        self.fsdp_mesh = flat(mesh, ("shard", *inner), "fsdp")  # a sharded parameter
        self.data_mesh = flat(mesh, ("replicate", "shard"), "data")  # different samples
        self.world_mesh = flat(mesh, names, "world")
        dims = ("pipeline", *inner, "tensor")  # of the processes that share samples
        self.model_mesh = flat(mesh, dims, "model") if self.sizes["pipeline"] > 1 else self.sequence_mesh

    @classmethod
    def create(cls, parallel: Parallel, device_type: str = "cpu") -> Layout:
        """The layout of the default process group.

        Raises:
            ValueError: the sizes do not fit the number of processes.
        """
        sizes, dims = parallel.sizes(dist.get_world_size()), mesh_dims(parallel.order)
        mesh = init_device_mesh(device_type, tuple(sizes[name] for name in dims), mesh_dim_names=dims)
        return cls(mesh, order=parallel.order, window=parallel.window)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, order: Order = "ulysses_inner", window: int = 1) -> Layout:
        """The layout of a mesh whose dimensions are some of ``DIMS``, in their order; those that it lacks have size 1.

        The mesh's groups are used as they are. All processes call this together, and all are in the mesh.

        Raises:
            ValueError: other dimensions, another order of them or of processes, or a part of a mesh.
        """
        names, dims = tuple(mesh.mesh_dim_names or ()), mesh_dims(order)
        if names != tuple(name for name in dims if name in names) or not names:
            raise ValueError(f"Layout.from_mesh: mesh must have dimensions of {dims} in this order, got {names}")
        if mesh.size() != dist.get_world_size():
            raise ValueError(
                f"Layout.from_mesh: mesh must hold all {dist.get_world_size()} processes, got {mesh.size()}; give the "
                "mesh that this one is a part of"
            )
        ranks = mesh.mesh.reshape([mesh[name].size() if name in names else 1 for name in dims])
        groups = {name: mesh.get_group(name) for name in names}
        return cls(with_groups(mesh.device_type, ranks, dims, groups), order=order, window=window)

    @classmethod
    def from_megatron(
        cls,
        parallel_state: Any = None,
        ulysses: int | None = None,
        device_type: str = "cpu",
        *,
        order: Order = "ulysses_inner",
        window: int = 1,
    ) -> Layout:
        """The layout of the groups that ``megatron.core.parallel_state`` has been initialised with.

        Its tensor, data (as ``shard``) and pipeline groups are used as they are. The context group is split into ring
        and Ulysses; Megatron's own hierarchical groups are used where they are the same. All processes call this.

        Args:
            parallel_state: the module; None: import it.
            ulysses: ranks of a context group for Ulysses, the others are for the ring. None: Megatron's innermost
                hierarchical group where there are two levels, otherwise all.

        Raises:
            ImportError: megatron-core is not there.
            ValueError: not initialised, in another order than Megatron's usual one, or ``ulysses`` does not divide the
                context ranks.
        """
        if parallel_state is None:
            parallel_state = import_megatron()
        if not parallel_state.is_initialized():
            raise ValueError("Layout.from_megatron: call parallel_state.initialize_model_parallel first")
        groups = {
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "shard": parallel_state.get_data_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "tensor": parallel_state.get_tensor_model_parallel_group(),
        }
        levels = parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False) or []
        context = dist.get_world_size(groups["context"])
        if math.prod(dist.get_world_size(group) for group in levels) != context:
            levels = []  # left over from an earlier initialisation, which Megatron does not clear
        if ulysses is None:
            ulysses = dist.get_world_size(levels[0]) if len(levels) == 2 else context
        if ulysses < 1 or context % ulysses:
            raise ValueError(f"Layout.from_megatron: ulysses must divide the {context} context ranks, got {ulysses}")
        ring = context // ulysses
        inner, outer = (ulysses, ring) if order == "ulysses_inner" else (ring, ulysses)
        numbers = [dist.get_rank(group) for group in groups.values()]
        sizes = [dist.get_world_size(group) for group in groups.values()]
        ranks = ranks_of(numbers, sizes).reshape(sizes[0], 1, sizes[1], outer, inner, sizes[3])
        whole, dims = groups.pop("context"), mesh_dims(order)
        if len(levels) == 2 and [dist.get_world_size(group) for group in levels] == [inner, outer]:
            groups |= {dims[4]: levels[0], dims[3]: levels[1]}
        elif 1 in (inner, outer):
            groups[dims[4] if outer == 1 else dims[3]] = whole
        return cls(with_groups(device_type, ranks, dims, groups), order=order, window=window)

    def rank(self, dim: str) -> int:
        """This process's place along a dimension, or along ``context``, ``sequence``, ``fsdp``, ``data``, ``world``."""
        return int(self._mesh_of(dim).get_local_rank())

    def size(self, dim: str) -> int:
        return int(self._mesh_of(dim).size())

    def group(self, dim: str) -> dist.ProcessGroup:
        """The group of this process along a dimension, or along ``context``, ``sequence``, ``fsdp``, ``data``."""
        return self._mesh_of(dim).get_group()

    def _mesh_of(self, dim: str) -> DeviceMesh:
        return self.mesh[dim] if dim in DIMS else getattr(self, f"{dim}_mesh")


def mesh_dims(order: Order) -> tuple[str, ...]:
    """The dimensions of a mesh, from the slowest to the fastest."""
    if order == "ulysses_inner":
        return DIMS
    return ("pipeline", "replicate", "shard", "ulysses", "ring", "tensor")


def flat(mesh: DeviceMesh, dims: Sequence[str], name: str) -> DeviceMesh:
    """Some dimensions as one. ``_flatten`` is PyTorch's own name for it; this is its only use.

    Where at most one of them has more than one process, that one is it: each group costs threads and memory.
    """
    several = [dim for dim in dims if mesh[dim].size() > 1]
    if len(several) <= 1:
        return mesh[several[0] if several else dims[-1]]
    return mesh[tuple(dims)]._flatten(name)


def with_groups(
    device_type: str, ranks: torch.Tensor, dims: Sequence[str], groups: Mapping[str, dist.ProcessGroup]
) -> DeviceMesh:
    """The mesh of ``ranks`` with groups that exist; those of other dimensions are made, by all processes together."""
    if ranks.flatten().tolist() != list(range(ranks.numel())):  # the ranks of a group are sorted, whatever a mesh says
        raise ValueError(
            f"Layout: numbers of processes must grow fastest along {dims[-1]}, then along "
            f"{', '.join(dims[-2::-1])}, got {ranks.tolist()}"
        )
    all_groups = []
    for axis, name in enumerate(dims):
        own = groups.get(name)
        if own is None:
            lines = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis]).tolist()
            made = [dist.new_group(line) for line in lines]
            own = next(group for group, line in zip(made, lines, strict=True) if dist.get_rank() in line)
        all_groups.append(own)
    return DeviceMesh.from_group(all_groups, device_type, ranks, mesh_dim_names=tuple(dims))


def ranks_of(numbers: list[int], sizes: list[int]) -> torch.Tensor:
    """The ranks of all processes, each in the place that it says it has in a grid of these sizes."""
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, tuple(numbers))
    ranks = torch.full(sizes, -1, dtype=torch.int)
    for rank, place in enumerate(places):
        ranks[place] = rank
    if math.prod(sizes) != len(places) or -1 in ranks:
        raise ValueError(f"Layout: groups of {sizes} processes must be a grid of all {len(places)} processes")
    return ranks


def import_megatron() -> Any:
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise ImportError(
            "Layout.from_megatron needs megatron-core, which is not installed: pip install 'vidgen[megatron]'"
        ) from error
    return parallel_state
