# SPDX-License-Identifier: Apache-2.0
"""Bytes that processes really send and keep in a step, to hold the planner's formulas against."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from layouts import make_layout
from tiny import make_inputs, make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vidgen.parallel import Parallel
from vidgen.parallel.context import spread
from vidgen.parallel.pipeline import Call, Pipeline
from vidgen.parallel.pipeline_stages import keep_steps, own_chunks
from vidgen.parallel.sharding import local, reduce_over_replicas, shard_model
from vidgen.parallel.tensor import tensor_parallel

LATENT, TEXT = (4, 8, 8), 8
HEADS = {"opensora_plan_v1_3": "num_attention_heads", "cogvideox": "num_attention_heads"}


class Traffic(TorchDispatchMode):
    """Counts the bytes that this process gives to others, by collective, under all that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            count = sent(name, args)
            if count:
                self.bytes[name] += count
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def sent(name: str, args: Any) -> int:
    """Of one collective, as the ring algorithms do it."""
    if name in ("recv_", "barrier", "recv_any_source_"):
        return 0
    if name == "send":
        return sum(size(t) for t in args[0])
    group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
    ranks, rank = group.size(), group.rank()
    if name == "alltoall_base_":
        given, splits = args[1], args[4]
        return (sum(splits) - splits[rank]) * given[:1].numel() * given.element_size()
    if name == "_allgather_base_":
        return size(args[1]) * (ranks - 1)
    if name == "_reduce_scatter_base_":
        return size(args[1]) * (ranks - 1) // ranks
    if name == "allreduce_":
        return sum(2 * size(t) * (ranks - 1) // ranks for t in args[0])
    raise AssertionError(f"{name} is not counted")


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


class Kept:
    """Counts the bytes of tensors that autograd keeps, what shares memory once, weights not at all."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: dict[int, Any] = {local(p).untyped_storage()._cdata: p for p in model.parameters()}
        self.bytes = 0

    def note(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return t

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda t: t)


def build(system: str, heads: int = 4) -> Any:
    """The tiny model of a system, with so many heads."""
    name = HEADS.get(system, "num_heads")
    return make_model(system, **{name: heads}, **({"hidden_size": 16 * heads} if system == "opensora_v2" else {}))


def exchanges(group: dist.ProcessGroup, system: str, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """For each case the bytes that this rank sends forward and backward, and keeps in between."""
    found = {}
    for name, case in cases.items():
        options = dict(case)
        skiparse = options.pop("skiparse", "heads")
        layout = make_layout(4, **options)
        assert layout is not None
        model = build(system)
        tensor_parallel(model, layout)
        spread(model, layout, skiparse)
        arguments = make_inputs(model, LATENT, batch=1, text=TEXT, masks=False)
        kept = Kept(model)
        with Traffic() as forward, kept.hooks():
            out = model(**arguments)
        with Traffic() as backward:
            out.sum().backward()
        found[name] = (forward.total, backward.total, kept.bytes)
    return found


def shards(group: dist.ProcessGroup, system: str, cases: dict[str, dict[str, Any]], micro: int) -> dict[str, int]:
    """For each case the bytes that this rank sends in the micro-steps of a step of a sharded model."""
    found = {}
    for name, case in cases.items():
        options = dict(case)
        reshard = options.pop("reshard_after_forward", True)
        layout = make_layout(4, **options)
        assert layout is not None
        model = build(system)
        arguments = make_inputs(model, LATENT, batch=1, text=TEXT, masks=False)
        shard_model(model, layout, reshard_after_forward=reshard)
        with Traffic() as traffic:
            for number in range(micro):
                reduce_over_replicas(model, last=number == micro - 1)
                model(**arguments).sum().backward()
        found[name] = traffic.total
    return found


def pipeline(group: dist.ProcessGroup, system: str, cases: dict[str, dict[str, Any]], micro: int) -> dict[str, int]:
    """For each case the bytes that this rank's stage sends to others in a step."""
    found = {}
    for name, case in cases.items():
        sizes = {key: value for key, value in case.items() if key != "stages"}
        layout, section = make_layout(4, **sizes), Parallel(**case)
        assert layout is not None
        model = build(system)
        keep_steps(model, own_chunks(model, layout, section))
        spread(model, layout)
        calls = [Call((), make_inputs(model, LATENT, batch=1, text=TEXT, masks=False)) for _ in range(micro)]
        pipe = Pipeline(model, layout, section)
        pipe.step(calls, lambda number, output: output.sum())  # the first one tells the shapes
        with Traffic() as traffic:
            pipe.step(calls, lambda number, output: output.sum())
        found[name] = traffic.bytes["send"]
    return found


def count_kept(model: Any, inputs: dict[str, Tensor]) -> int:
    """What a forward pass keeps; where blocks are recomputed, also what the largest of them then keeps by itself."""
    kept, recomputed, largest = Kept(model), model.gradient_checkpointing, 0
    with kept.hooks():
        model(**inputs)
    if recomputed:
        model.gradient_checkpointing = False
        for block in model.blocks:
            largest = max(largest, kept_by(block, model, inputs))
    return kept.bytes + largest


def kept_by(block: torch.nn.Module, model: Any, inputs: dict[str, Tensor]) -> int:
    own, active = Kept(model), contextlib.ExitStack()
    handles = [
        block.register_forward_pre_hook(lambda *_: active.enter_context(own.hooks()) and None),
        block.register_forward_hook(lambda *_: active.close()),
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return own.bytes
