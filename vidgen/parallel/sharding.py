# SPDX-License-Identifier: Apache-2.0
"""Parameters, gradients and optimizer in shards: FSDP2, and HSDP where there are replicas of the shards.

Gradients are summed over ranks, never averaged: each rank scales its own loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .layout import Layout

Order = tuple[int, Tensor]  # an axis, and where its indices lie in the usual order
BUCKET = 1 << 24  # elements of a buffer that many small tensors travel in


def shard_model(
    model: nn.Module,
    layout: Layout,
    *,
    param_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    forward_methods: Sequence[str] = (),
) -> nn.Module:
    """Shard the parameters of ``model`` over the layout's ``fsdp`` ranks, in place, and return it.

    Every module of :func:`blocks_of` is gathered and freed by itself, what is left with the root. Parameters keep their
    dtype as shards, computation is in ``param_dtype`` (buffers are cast to it), gradients are summed in float32 over
    ``fsdp`` and ``replicate``. Parameters may be DTensors over ``layout.mesh["tensor"]``, on the meta device (see
    :func:`fill`), or the same on every rank of ``fsdp``.

    Args:
        reshard_after_forward: free a block's parameters between its forward and its backward pass.
        cpu_offload: shards and their gradients, and so the optimizer, live on the host.
        forward_methods: methods of the root beside ``forward`` that use parameters.
    """
    mesh = sharding_mesh(layout)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False),
        # Pinning is for copies to another device; there is none on a host.
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    for block in blocks_of(model):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # other reductions exist only where nccl is
        kind = type(module)  # one that FSDP2 has made; configurations and messages name the model's own
        kind.__name__ = kind.__name__.removeprefix("FSDP")
    for name in forward_methods:
        register_fsdp_forward_method(model, name)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(param_dtype)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself: ``model.blocks``, or the entries of the outermost lists of modules.

    A model with neither is sharded as a whole. Blocks of other stages of a pipeline have no parameters.
    """
    blocks: Any = getattr(model, "blocks", None)
    if blocks is not None:
        return [block for block in blocks if any(True for _ in block.parameters())]
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    return [entry for name in lists for entry in model.get_submodule(name).children()]


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def sharding_mesh(layout: Layout) -> DeviceMesh:
    """``fsdp`` alone, or ``(replicate, fsdp)`` where there are replicas, which FSDP2 takes for HSDP."""
    if layout.sizes["replicate"] == 1:
        return layout.fsdp_mesh
    if hasattr(DeviceMesh, "_concatenate"):
        return DeviceMesh._concatenate([layout.mesh["replicate"], layout.fsdp_mesh])
    (name,) = layout.fsdp_mesh.mesh_dim_names or ()
    return layout.mesh["replicate", name]  # older PyTorch slices flattened dimensions too


def reduce_over_replicas(model: nn.Module, last: bool) -> None:
    """Whether the next backward pass adds gradients up over the replicas: only that of the last micro-step needs to.

    Over ``fsdp`` they are added up in every pass, so that no rank ever holds the gradients of a whole model.
    """
    for module in fsdp_modules(model):
        module.set_requires_all_reduce(last)


# Tensors


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; other tensors as they are."""
    return t.to_local() if isinstance(t, DTensor) else t


def is_cut(t: Tensor, dim: str) -> bool:
    """Whether a tensor is sharded along this dimension of a mesh."""
    if not isinstance(t, DTensor):
        return False
    names = t.device_mesh.mesh_dim_names or ()
    return any(name == dim and p.is_shard() for name, p in zip(names, t.placements, strict=True))


def like(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` as this rank's part of a tensor that lies as ``whole`` does; it may be on another device."""
    # from_local would move it, and knows no shards of shards
    return DTensor(part, whole._spec, requires_grad=False) if isinstance(whole, DTensor) else part


def buckets(tensors: Iterable[Tensor], limit: int = BUCKET) -> Iterator[list[Tensor]]:
    """Consecutive tensors with at most ``limit`` elements together; a larger one is alone."""
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and sum(other.numel() for other in bucket) + t.numel() > limit:
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


@torch.no_grad()
def sum_over_tensor(parameters: Iterable[Tensor], layout: Layout) -> None:
    """Add up the gradients of parameters that tensor parallelism does not cut, over the ``tensor`` ranks, in place.

    To be called after the last backward pass of a step. Every rank of the group has gradients of the same parameters.
    """
    if layout.size("tensor") == 1:
        return
    gradients = [local(p.grad) for p in parameters if p.grad is not None and not is_cut(p, "tensor")]
    for bucket in buckets(g for g in gradients if g.numel()):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat, group=layout.group("tensor"))
        for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(part.view_as(g))


# Whole models in and out of shards


@torch.no_grad()
def fill(
    model: nn.Module,
    whole: Mapping[str, Tensor] | None,
    templates: Mapping[str, Tensor],
    layout: Layout,
    orders: Mapping[str, Order] | None = None,
) -> None:
    """Give every rank its parts of the tensors ``whole``, which only the first rank of the layout has.

    Tensor by tensor is sent to all, and each keeps its part, so that no rank holds more than one whole tensor beside
    its shards. All ranks call this.

    Args:
        model: sharded.
        whole: the whole tensors, on the first rank; elsewhere ignored.
        templates: shape and dtype of everything that is sent, in the same order on all ranks; what ``model`` does not
            have belongs to other stages of a pipeline.
        orders: of parameters of which an axis lies in another order than in ``whole``, see
            :func:`vidgen.parallel.tensor.row_order`.

    Raises:
        ValueError: the model has a parameter or buffer that ``templates`` lacks, or one of another shape.
    """
    own = tensors_of(model)
    if lacking := [name for name in own if name not in templates]:
        raise ValueError(f"fill: templates must hold every tensor of the model, got none of {', '.join(lacking[:10])}")
    for name, target in own.items():
        if target.shape != templates[name].shape:
            raise ValueError(f"fill: {name} must be {tuple(target.shape)}, got {tuple(templates[name].shape)}")
    group = layout.group("world")
    first = dist.get_global_rank(group, 0)
    for name, template in templates.items():
        buffer = torch.empty(template.shape, dtype=template.dtype, device=layout.mesh.device_type)
        if dist.get_rank() == first:
            assert whole is not None
            buffer.copy_(whole[name])
        dist.broadcast(buffer, src=first, group=group)
        if name in own:
            if orders and name in orders:
                axis, order = orders[name]
                buffer = buffer.index_select(axis, order.to(buffer.device))
            copy_part(own[name], buffer)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those too that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_part(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of ``whole`` into ``target``."""
    if isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        if 0 in shape:
            return
        whole = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    local(target).copy_(whole)


@torch.no_grad()
def gather(
    tensors: Mapping[str, Tensor], layout: Layout, orders: Mapping[str, Order] | None = None
) -> dict[str, Tensor]:
    """The whole tensors on the host of the first rank; elsewhere an empty map.

    All ranks call this; one whole tensor at a time is on each device. ``orders``: as for :func:`fill`.
    """
    keeps = all(layout.rank(dim) == 0 for dim in ("replicate", "fsdp", "tensor"))
    kept: dict[str, Tensor] = {}
    for name, t in tensors.items():
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        if keeps:
            whole = whole.detach().to("cpu", copy=True)
            if orders and name in orders:
                axis, order = orders[name]
                whole = whole.index_select(axis, order.cpu().argsort())
            kept[name] = whole
    if keeps and layout.size("pipeline") > 1:
        stages: list[Any] = [None] * layout.size("pipeline")
        dist.all_gather_object(stages, kept, group=layout.group("pipeline"))
        kept = {name: t for stage in stages for name, t in stage.items()}
    return kept if layout.rank("world") == 0 else {}
