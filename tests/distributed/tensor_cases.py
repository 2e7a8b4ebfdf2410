# SPDX-License-Identifier: Apache-2.0
"""Whole transformers whose weights are cut over processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from attention_cases import difference
from layouts import make_layout
from tiny import make_inputs, make_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vidgen.checkpoints.convert import convert
from vidgen.checkpoints.lazy import read_torch
from vidgen.ops.context_parallel.exchange import all_reduce, gather, reduce_scatter
from vidgen.parallel import Layout
from vidgen.parallel.context import spread
from vidgen.parallel.rank_files import load_rank_files, save_rank_files
from vidgen.parallel.sharding import shard_model, sum_over_tensor
from vidgen.parallel.tensor import row_order, tensor_parallel, usual_order


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def model(
    group: dist.ProcessGroup,
    system: str,
    members: int,
    parallel: dict[str, Any],
    *,
    preset: str | None = None,
    latent: tuple[int, int, int] = (3, 6, 10),
    checkpointing: bool = False,
    changes: dict[str, Any] | None = None,
    fsdp: bool = False,
    **inputs: Any,
) -> dict[str, float]:
    """Largest differences of the output and of every parameter's gradient from one process, and the share of the
    blocks' values that a rank holds."""
    layout = make_layout(members, **parallel)
    if layout is None:
        return {}
    alone = make_model(system, preset, **changes or {})
    own = copy.deepcopy(alone)
    own.gradient_checkpointing = checkpointing
    spread(own, layout)
    tensor_parallel(own, layout)
    errors = {"share": share(own, alone)}
    if fsdp:
        shard_model(own, layout)
    replicas = layout.size("data")
    for number in range(replicas):  # each replica has a sample of its own
        arguments = make_inputs(alone, latent, seed=number, **inputs)
        expected = alone(**arguments)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3 + number))
        (expected * upstream).sum().backward()
        if number != layout.rank("data"):
            continue
        got = own(**arguments)
        errors["output"] = difference(got.detach(), expected.detach()) / expected.abs().max().item()
        ((got * upstream).sum() / layout.size("sequence")).backward()
    return errors | gradient_errors(alone, own, layout, fsdp)


def gradient_errors(alone: nn.Module, own: nn.Module, layout: Layout, fsdp: bool) -> dict[str, float]:
    errors, order = {}, row_order(own)
    gradients = [p.grad for p in alone.parameters() if p.grad is not None]
    largest = max(g.abs().max().item() for g in gradients)
    sum_over_tensor(own.parameters(), layout)
    for (name, p), q in zip(alone.named_parameters(), own.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is None or q.grad is None:
            continue
        if not fsdp:  # which sums over these ranks by itself
            local = q.grad.to_local() if isinstance(q.grad, DTensor) else q.grad
            dist.all_reduce(local, group=layout.group("context"))
        assert torch.equal(usual_order(whole(q.detach()), order.get(name)), p), name
        gradient = usual_order(whole(q.grad), order.get(name))
        errors[name] = difference(gradient, p.grad) / max(p.grad.abs().max().item(), 0.01 * largest)
    return errors


def share(own: Any, alone: Any) -> float:
    """The part of the blocks' weights (vectors aside) that this rank holds."""

    def count(m: Any) -> int:
        parameters = [p for block in m.blocks for n, p in block.named_parameters() if p.dim() > 1 and "table" not in n]
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)

    return count(own) / count(alone)


def rank_files(
    group: dist.ProcessGroup, system: str, members: int, tensor: int, folder: str, changes: dict[str, Any]
) -> dict[str, Any]:
    """Files of a model in shards: whether they are those of `vidgen convert`, and what comes back from them."""
    layout = make_layout(members, tensor=tensor)
    if layout is None:
        return {}
    alone, root = make_model(system, **changes), Path(folder)
    own = shard_model(tensor_parallel(copy.deepcopy(alone), layout), layout)
    with mock.patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gathers:
        save_rank_files(own, layout, root / "ours")
    if dist.get_rank() == 0:
        alone.save_pretrained(root / "whole")
        count = tensor if system != "opensora_v2" else 1  # which MindSpeed-MM does not cut
        convert(root / "whole", root / "wanted", "mindspeed-mm", tp=count)
    dist.barrier(layout.group("world"))
    files = [sorted(p.relative_to(root / n) for p in (root / n).rglob("*.*")) for n in ("ours", "wanted")]
    assert files[0] == files[1], files
    for name in (f for f in files[0] if f.suffix == ".pt"):
        ours, wanted = (read_torch(root / n / name)["model"] for n in ("ours", "wanted"))
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[key], t) and ours[key].dtype == t.dtype for key, t in wanted.items())
    returned: dict[str, Any] = {"gathered": gathers.call_count}
    for called, parts in (("same", layout), ("two", make_layout(2, tensor=2)), ("whole", make_layout(1))):
        if parts is None:
            continue
        other = tensor_parallel(make_model(system, seed=5, **changes), parts)
        if called == "same":
            shard_model(other, parts)
        load_rank_files(other, parts, root / "ours")
        order, wholes = row_order(other), dict(alone.named_parameters())
        found = {name: usual_order(whole(p.detach()), order.get(name)) for name, p in other.named_parameters()}
        returned[called] = all(torch.equal(found[name], p) for name, p in wholes.items())
    return returned


def collectives(group: dist.ProcessGroup, sizes: list[int], dim: int) -> None:
    """Joining and adding up in 16 bits, and their gradients, against float32 that is rounded once."""
    shape = [2, 3, 4]
    shape[dim] = sum(sizes)
    every = torch.randn(len(sizes), *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    rank = dist.get_rank(group)
    total = every.float().sum(0).bfloat16()
    own = every[0].split(sizes, dim)[rank].clone().requires_grad_()
    joined = gather(own, dim, sizes, group)
    assert torch.equal(joined, every[0])
    joined.backward(every[rank])
    assert torch.equal(own.grad, total.split(sizes, dim)[rank])
    x = every[rank].clone().requires_grad_()
    summed = reduce_scatter(x, dim, sizes, group)
    assert torch.equal(summed, total.split(sizes, dim)[rank])
    summed.backward(every[1].split(sizes, dim)[rank])
    assert torch.equal(x.grad, every[1])
    assert torch.equal(all_reduce(every[rank], dim, sizes, group), total)
