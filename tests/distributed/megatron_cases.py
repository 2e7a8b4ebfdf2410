# SPDX-License-Identifier: Apache-2.0
"""Layouts of meshes and groups that others have made. These are cases of all processes of the pool."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attention_cases import difference
from tensor_cases import gradient_errors
from tiny import make_inputs, make_model
from torch.distributed.device_mesh import init_device_mesh

from vidgen import ops
from vidgen.ops import context_parallel as cp
from vidgen.parallel import Layout
from vidgen.parallel.context import spread
from vidgen.parallel.sharding import shard_model
from vidgen.parallel.tensor import tensor_parallel


def groups_of(layout: Layout) -> dict[str, list[int]]:
    names = ("pipeline", "replicate", "shard", "ring", "ulysses", "tensor", "context", "sequence", "fsdp", "data")
    return {name: dist.get_process_group_ranks(layout.group(name)) for name in names}


def errors_of(layout: Layout, system: str, *, fsdp: bool = False) -> dict[str, float]:
    """Of a model's output and gradients."""
    alone = make_model(system)
    own = copy.deepcopy(alone)
    spread(own, layout)
    tensor_parallel(own, layout)
    if fsdp:
        shard_model(own, layout)
    arguments = make_inputs(alone)
    expected, got = alone(**arguments), own(**arguments)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * upstream).sum().backward()
    ((got * upstream).sum() / layout.size("sequence") / layout.size("data")).backward()
    found = {"output": difference(got.detach(), expected.detach()) / expected.abs().max().item()}
    return found | gradient_errors(alone, own, layout, fsdp)


def from_mesh(group: dist.ProcessGroup, sizes: dict[str, int], system: str | None = None) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    layout = Layout.from_mesh(mesh)
    same = all(layout.group(name) is mesh.get_group(name) for name in sizes)
    errors = errors_of(layout, system, fsdp=True) if system else {}
    return {"groups": groups_of(layout), "sizes": layout.sizes, "same": same, "errors": errors}


def from_other_mesh(group: dist.ProcessGroup, names: tuple[str, ...], part: str | None = None) -> str:
    """What is said of a mesh with these dimensions, or of a part of it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    try:
        Layout.from_mesh(mesh[part] if part else mesh)
    except ValueError as error:
        return str(error)
    return ""


class Einops:
    """The one function that Megatron takes from einops, for hierarchical groups, and for the one pattern it has."""

    @staticmethod
    def rearrange(ranks: np.ndarray, pattern: str, **sizes: int) -> np.ndarray:
        assert pattern == "(l s u) -> (l u) s"
        return ranks.reshape(sizes["l"], sizes["s"], sizes["u"]).transpose(0, 2, 1).reshape(-1, sizes["s"])


def from_megatron(
    group: dist.ProcessGroup, initialize: dict[str, Any], system: str | None = None, **options: Any
) -> dict[str, Any]:
    from megatron.core import parallel_state

    with mock.patch.multiple(parallel_state, HAVE_EINOPS=True, einops=Einops, create=True):
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **initialize)
    try:
        with pytest.raises(ValueError, match=r"ulysses must divide the \d context ranks, got 3"):
            Layout.from_megatron(parallel_state, ulysses=3)
        layout = Layout.from_megatron(parallel_state, **options)
        context, tensor = (
            parallel_state.get_context_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        own = {"tensor": layout.group("tensor") is tensor}
        if layout.size("ulysses") == layout.size("context") > 1:
            own["ulysses"] = layout.group("ulysses") is context
        found: dict[str, Any] = {"groups": groups_of(layout), "own": own}
        if "hierarchical_context_parallel_sizes" in initialize:
            levels = parallel_state.get_hierarchical_context_parallel_groups()
            own["levels"] = [layout.group("ulysses"), layout.group("ring")] == levels
        if system:
            found["errors"] = errors_of(layout, system, fsdp=True) | {"attention": bare_attention(context)}
    finally:
        parallel_state.destroy_model_parallel()
    return found


def bare_attention(group: dist.ProcessGroup) -> float:
    """The error of context-parallel attention on Megatron's group alone, without a layout."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 13, 3, 8, generator=random) for _ in range(3))
    sizes, rank = cp.shard_sizes(13, dist.get_world_size(group)), dist.get_rank(group)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    expected = ops.attention(q, k, v)[:, own]  # type: ignore[index]
    errors = [
        difference(attend(q[:, own], k[:, own], v[:, own], group, sizes=sizes), expected)
        for attend in (cp.ulysses_attention, cp.ring_attention)
    ]
    return max(errors)


def refused(group: dist.ProcessGroup) -> list[str]:
    """What is said without the package, and without initialisation."""
    from megatron.core import parallel_state

    said = []
    package = sys.modules["megatron.core"]
    sys.modules["megatron.core"] = None  # type: ignore[assignment]  # mock.patch.dict would forget what is imported now
    try:
        Layout.from_megatron()
    except ImportError as error:
        said.append(str(error))
    finally:
        sys.modules["megatron.core"] = package
    try:
        Layout.from_megatron(parallel_state)
    except ValueError as error:
        said.append(str(error))
    return said
