# SPDX-License-Identifier: Apache-2.0
"""Sharded models and optimizers on processes of the pool, each compared with one process in the same place."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from layouts import make_layout
from tiny import make_inputs, make_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vidgen.parallel import Layout
from vidgen.parallel.sharding import (
    blocks_of,
    fill,
    fsdp_modules,
    gather,
    local,
    reduce_over_replicas,
    shard_model,
    sum_over_tensor,
    tensors_of,
)
from vidgen.train.gradient_clipping import AdaptiveGradientClipping, gradient_norm, norm_over
from vidgen.train.optimizer import EMAAdamW
from vidgen.train.sharded_optimizer import ShardedEMAAdamW

Group = dist.ProcessGroup
# eps hides that parameters without influence, such as the bias of keys, have gradients of nothing but rounding
OPTIONS: dict[str, Any] = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1, "ema_decay": 0.9}


def sharded_copy(model: nn.Module, layout: Layout, **options: Any) -> Any:
    """The model in shards, filled from the first rank; elsewhere no weight of ``model`` is looked at."""
    if layout.rank("world"):
        model = copy.deepcopy(model)
        for t in tensors_of(model).values():
            t.data.fill_(float("nan"))
    shards = copy.deepcopy(model).to("meta")
    templates = {name: t.detach() for name, t in tensors_of(shards).items()}
    shard_model(shards, layout, **options)
    shards.to_empty(device="cpu")
    fill(shards, tensors_of(model) if layout.rank("world") == 0 else None, templates, layout)
    return shards


def loss_of(model: Any, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = make_inputs(model, (2, 4, 6), batch=1, text=5, seed=number)
    inputs = {n: t.to(dtype) if t.is_floating_point() and "timestep" not in n else t for n, t in inputs.items()}
    out = model(**inputs)
    assert out.dtype == dtype
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1000 + number))
    return (out.float() - target).square().mean()


def three_steps(
    group: Group,
    system: str,
    members: int,
    accumulation: int = 1,
    dtype: str = "float32",
    recompute: bool = False,
    options: dict[str, Any] | None = None,
    **parallel: Any,
) -> dict[str, float] | None:
    """The largest differences to one process of losses, gradient norms, weights, and every part of the state."""
    layout = make_layout(members, **parallel)
    if layout is None:
        return None
    kind = getattr(torch, dtype)
    alone = make_model(system)
    shards = sharded_copy(alone, layout, param_dtype=kind, **(options or {}))
    alone.to(kind)
    for p in alone.parameters():
        p.grad_dtype = torch.float32
    alone.gradient_checkpointing = shards.gradient_checkpointing = recompute
    names, shared = dict(alone.named_parameters()), dict(shards.named_parameters())
    assert names.keys() == shared.keys()
    optimizer, own = EMAAdamW(names.values(), **OPTIONS), ShardedEMAAdamW(shared, layout, **OPTIONS)
    norm = norm_over(layout)
    clips = AdaptiveGradientClipping(0.9), AdaptiveGradientClipping(0.9, norm=norm)
    worst = {"loss": 0.0, "norm": 0.0}
    micro_steps = accumulation * layout.size("data")
    for step in range(3):
        losses = []
        for micro in range(micro_steps):
            loss = loss_of(alone, 100 * step + micro, kind)
            (loss / micro_steps).backward()
            losses.append(float(loss.detach()))
        for m in range(accumulation):
            micro = m * layout.size("data") + layout.rank("data")
            loss = loss_of(shards, 100 * step + micro, kind)
            reduce_over_replicas(shards, last=m + 1 == accumulation)
            (loss / micro_steps).backward()
            worst["loss"] = max(worst["loss"], abs(float(loss.detach()) - losses[micro]))
        assert all(p.grad.dtype == torch.float32 for p in shared.values())
        results = clips[0](names.values()), clips[1](shared.values())
        worst["norm"] = max(worst["norm"], *(abs(getattr(results[0], n) - getattr(results[1], n)) for n in NORMS))
        for each in (optimizer, own):
            each.step()
            each.zero_grad()
    return worst | compare(layout, names, shared, optimizer, own)


NORMS = ("norm", "norm_after", "coefficient")


def compare(
    layout: Layout,
    names: dict[str, Tensor],
    shared: dict[str, Tensor],
    optimizer: EMAAdamW,
    own: ShardedEMAAdamW,
) -> dict[str, float]:
    def worst(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> float:
        differences = [(given[n].full_tensor() - t).abs().max() for n, t in wanted.items() if t.numel()]
        return float(torch.stack([d.detach().float() for d in differences]).max())

    states = {name: optimizer.state[p] for name, p in names.items()}
    full = own.full_state()
    assert all(part["step"] == 3 for part in full.values())
    found = {"weights": worst({n: states[n].get("master", p) for n, p in names.items()}, shared)}
    for part in ("exp_avg", "exp_avg_sq", "ema"):
        found[part] = worst({n: s[part] for n, s in states.items()}, {n: s[part] for n, s in full.items()})
    before = {n: local(p).clone() for n, p in shared.items()}
    with own.use_ema():
        found["use_ema"] = worst({n: s["ema"] for n, s in states.items()}, shared)
    assert all(torch.equal(local(p), before[n]) for n, p in shared.items())
    whole = gather(shared, layout)
    assert bool(whole) == (layout.rank("world") == 0)
    wanted = {n: p.full_tensor() for n, p in shared.items()}
    assert all(torch.equal(t, wanted[n]) for n, t in whole.items())
    bytes_of_all = sum(s[part].numel() * 4 for s in states.values() for part in ("exp_avg", "exp_avg_sq", "ema"))
    found["bytes"] = own.state_bytes() / bytes_of_all
    return found


def placed(group: Group, system: str) -> dict[str, Any]:
    """How HSDP of 2 x 2 lies, and that loading a state restores it."""
    layout = make_layout(4, replicate=2)
    assert layout is not None
    shards = sharded_copy(make_model(system), layout)
    wrapped = list(fsdp_modules(shards))
    own = ShardedEMAAdamW(dict(shards.named_parameters()), layout, **OPTIONS)
    for number in range(2):
        loss_of(shards, number + layout.rank("data")).backward()
        own.step()
        own.zero_grad()
    state = own.full_state()
    fresh = ShardedEMAAdamW(dict(shards.named_parameters()), layout, **OPTIONS)
    fresh.load_full_state(state)
    fresh.load_group_options(own.param_groups)
    again = fresh.full_state()
    p = next(iter(shards.parameters()))
    assert isinstance(p, DTensor)
    return {
        "modules": len(wrapped),
        "blocks": len(blocks_of(shards)),
        "mesh": p.device_mesh.mesh_dim_names,
        "restored": all(torch.equal(local(state[n][k]), local(again[n][k])) for n in state for k in state[n]),
        "steps": fresh.param_groups[0]["num_steps"],
    }


def tensor_sums(group: Group) -> dict[str, float]:
    """Gradients of parameters that tensor ranks hold alike are summed over them, in buckets, cut ones are not."""
    from torch.distributed.tensor import Shard, distribute_tensor

    layout = make_layout(4, shard=2, tensor=2)
    assert layout is not None
    rank = layout.rank("tensor")
    torch.manual_seed(0)
    cut = nn.Parameter(distribute_tensor(torch.randn(6, 4), layout.mesh["tensor"], [Shard(0)]))
    alike = [nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (5,), (0,))]
    cut.grad = DTensor.from_local(torch.full((3, 4), 1.0 + rank), layout.mesh["tensor"], [Shard(0)], run_check=False)
    for i, p in enumerate(alike):
        p.grad = torch.full_like(p, 10.0**i * (1 + rank))
    sum_over_tensor([cut, *alike], layout)
    found = {f"alike {i}": float((p.grad - 3 * 10.0**i).abs().sum()) for i, p in enumerate(alike)}
    found["cut"] = float((cut.grad.to_local() - 1 - rank).abs().sum())
    # Each fsdp rank has its own part of every parameter; as these have no shards, the parts count twice.
    wanted = gradient_norm([torch.ones(12), torch.full((12,), 2.0), *(p.grad for p in alike)]) * 2**0.5
    found["norm"] = abs(norm_over(layout)([cut.grad, *(p.grad for p in alike)]) - wanted)
    return found
