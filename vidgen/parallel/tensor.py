# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: the ranks of ``layout.tensor`` share the linear layers of a model, as its ``tensor_plan`` says.

Weights are DTensors over these ranks; each computes with its own part. Between the layers the ranks share the tokens
(``vidgen.parallel.context``): these meet before layers that are cut by columns, and partial sums of all tokens are
added up and shared out after layers that are cut by rows.

Fused axes (queries, keys and values in one weight) are reordered before they are cut, so that a rank's part holds its
own share of each: :func:`row_order` says how. Whole models, and checkpoints, have the usual order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vidgen.nn import Cut, WideLinear, wide_linear
from vidgen.ops.context_parallel.exchange import gather

from .layout import Layout
from .plan import nearest_divisors


def tensor_parallel(model: nn.Module, layout: Layout) -> nn.Module:
    """Cut the linear layers of ``model`` over the layout's ``tensor`` ranks, in place, and return it.

    Every rank keeps its part of the values that its model has now (or that is filled in later, on the meta device), and
    frees the rest. Use it with ``vidgen.parallel.context.spread``, and before ``shard_model``.

    Gradients of parameters that are not cut are those of this rank's share of the work: to be summed over ``tensor``
    (``vidgen.parallel.sharding.sum_over_tensor``).

    Raises:
        ValueError: see :func:`tensor_problems`; nothing is changed then.
    """
    size = layout.size("tensor")
    if problems := tensor_problems(model, size):
        raise ValueError("\n".join(problems))
    if size == 1:
        return model
    mesh = layout.mesh["tensor"]
    for name, layer, cut in list(cut_layers(model)):
        assert cut is not None
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, PartialLinear(layer, cut, mesh))
    for module in model.modules():
        if hasattr(module, "sections"):  # what a block splits the outputs of a fused layer into
            module.sections = tuple(n // size for n in module.sections)  # type: ignore[assignment, union-attr]
    return model


def tensor_problems(model: nn.Module, size: int) -> list[str]:
    """Why ``size`` ranks cannot share the layers of ``model``; empty if they can."""
    if size == 1:
        return []
    kind = type(model).__name__
    if not hasattr(model, "tensor_plan"):
        return [f"tensor_parallel: {kind} has no plan of how to cut it, got tensor={size}; nearest: tensor=1"]
    if any(isinstance(module, PartialLinear) for module in model.modules()):
        return [f"tensor_parallel: model must be whole, this {kind} has been cut before"]
    layers = list(cut_layers(model))
    if uncut := [name for name, _, cut in layers if cut is None]:
        return [f"tensor_parallel: the plan of {kind} must say how to cut every layer of its blocks, not {uncut[:5]}"]
    heads: int = model.tensor_plan().heads  # type: ignore[operator]
    sections = {name: sections_of(layer, cut) for name, layer, cut in layers if cut is not None}
    common = math.gcd(heads, *(n for parts in sections.values() for n in parts))
    nearest = f"nearest: {nearest_divisors(common, size)}"
    if heads % size:
        return [f"tensor_parallel: tensor must divide the {heads} heads of {kind}, got {size}; {nearest}"]
    for name, parts in sections.items():
        if any(n % size for n in parts):
            return [f"tensor_parallel: tensor must divide the sections {parts} of {name}, got {size}; {nearest}"]
    return []


def cut_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear, Cut | None]]:
    """The linear layers that the plan names, and those of blocks that it forgets, each with its cut."""
    plan: Any = model.tensor_plan()  # type: ignore[operator]
    in_blocks = {module for block in model.blocks for module in block.modules()}  # type: ignore[union-attr, operator]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        cut = next((cut for pattern, cut in plan.cuts.items() if fnmatchcase(name, pattern)), None)
        if cut is not None or module in in_blocks:
            yield name, module, cut


def sections_of(layer: nn.Linear, cut: Cut) -> tuple[int, ...]:
    """Sizes of the parts of the axis that is cut."""
    whole = layer.in_features if cut.way == "row" else layer.out_features
    if cut.sections and sum(cut.sections) != whole:
        raise ValueError(f"tensor_parallel: sections {cut.sections} must add up to {whole}")
    return cut.sections or (whole,)


class PartialLinear(nn.Module):
    """This rank's part of a linear layer.

    Cut by columns: ``(..., in)`` to ``(..., out / ranks)``, or all outputs where they are gathered. By rows:
    ``(..., in / ranks)`` to ``(..., out)``, of which the sum over the ranks is the output. The bias of the latter is
    whole; the first rank adds it.
    """

    def __init__(self, whole: nn.Linear, cut: Cut, mesh: DeviceMesh) -> None:
        super().__init__()
        self.way, self.sections_of_axis = cut.way, sections_of(whole, cut)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.wide = isinstance(whole, WideLinear)
        self.weight = part_of(whole.weight, 1 if cut.way == "row" else 0, self.sections_of_axis, mesh)
        self.bias: Any = whole.bias
        if whole.bias is not None and cut.way != "row":
            self.bias = part_of(whole.bias, 0, self.sections_of_axis, mesh)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        mesh, bias = weight.device_mesh, self.bias
        if bias is not None:  # by rows, times 0 or 1: so it has a gradient on every rank
            bias = bias * float(mesh.get_local_rank() == 0) if self.way == "row" else bias.to_local()
        y = (wide_linear if self.wide else F.linear)(x, weight.to_local(), bias)
        if self.way != "gathered":
            return y
        return gather(y, y.dim() - 1, [y.shape[-1]] * mesh.size(), mesh.get_group())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.way}"


def part_of(whole: Tensor, dim: int, sections: Sequence[int], mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of a parameter, as a DTensor."""
    rank, size = mesh.get_local_rank(), mesh.size()
    own = order_of(sections, size).chunk(size)[rank].to(whole.device)
    part = whole.detach().index_select(dim, own)
    return nn.Parameter(DTensor.from_local(part, mesh, [Shard(dim)], run_check=False), whole.requires_grad)


def order_of(sections: Sequence[int], size: int) -> Tensor:
    """Where the indices of a reordered axis lie in the usual order: each rank's shares of all sections follow each
    other."""
    parts = torch.arange(sum(sections)).split(list(sections))
    return torch.cat([part.chunk(size)[rank] for rank in range(size) for part in parts])


def row_order(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Parameters of which an axis lies in another order than in the whole model: the axis, and a permutation; index i
    of the parameter is index ``permutation[i]`` of the whole model's."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, PartialLinear) or module.weight is None or len(module.sections_of_axis) == 1:
            continue  # without weights it belongs to another stage of a pipeline
        weight: Any = module.weight
        mesh = weight.device_mesh
        order = order_of(module.sections_of_axis, mesh["tensor"].size())
        found[f"{prefix}.weight"] = (1 if module.way == "row" else 0), order
        if module.bias is not None and module.way != "row":
            found[f"{prefix}.bias"] = 0, order
    return found


def reordered(whole: Tensor, order: tuple[int, Tensor] | None) -> Tensor:
    """A whole tensor with its axis as :func:`row_order` has it; as it is for None."""
    return whole if order is None else whole.index_select(order[0], order[1].to(whole.device))


def usual_order(whole: Tensor, order: tuple[int, Tensor] | None) -> Tensor:
    """The inverse of :func:`reordered`."""
    return whole if order is None else whole.index_select(order[0], order[1].argsort().to(whole.device))
