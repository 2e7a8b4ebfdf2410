# SPDX-License-Identifier: Apache-2.0
"""What a model computes, keeps and passes on in each of its blocks, read off a forward pass without any data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vidgen import ops
from vidgen.nn import DENSE, Place, Tokens
from vidgen.parallel.tensor import cut_layers

INITIALIZERS = ("normal_", "uniform_", "trunc_normal_", "zero_", "zeros_", "fill_", "constant_", "ones_", "eye_")


class WithoutInitializing(TorchFunctionMode):
    """Leaves out the drawing of weights, which takes most of the time that a large model takes on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in INITIALIZERS:
            return args[0] if args else next(iter(kwargs.values()))
        if kwargs.get("out") is not None:
            return kwargs["out"]
        return func(*args, **kwargs)


def build(model_class: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device: names and shapes, no weights."""
    with torch.device("meta"), WithoutInitializing():
        model: nn.Module = model_class(config)
    return model.to(dtype)


@dataclass
class Seen:
    """Of one block, or of what comes before or after all: FLOPs and bytes of a forward pass of one sample, as in
    ``vidgen.parallel.facts.Step``."""

    linear: float = 0.0
    attention: float = 0.0
    saved: float = 0.0
    textless: float = 0.0  # of it, tensors without text in them
    gathered: float = 0.0
    outside: float = 0.0
    inputs: float = 0.0
    stream: float = 0.0
    conditions: float = 0.0  # of it, what is no tokens
    gathers: float = 0.0
    outputs: float = 0.0  # of gathers, those that are no tokens
    scatters: float = 0.0
    moves: float = 0.0
    joins: float = 0.0
    widest: float = 0.0
    text: int | None = None
    joint: bool = False
    answers: bool = True
    heads: int = 0
    width: int = 0


class Traced(Tokens):
    """Notes what the blocks ask of their tokens, and does nothing to them."""

    def __init__(self, trace: Trace, video: int, text: int) -> None:
        self.trace = trace
        trace.counts = (video, text)

    def join(self, x: Tensor, place: Place = DENSE) -> Tensor:
        self.trace.now.joins += size(x)
        return x

    def split_text(self, y: Tensor) -> Tensor:
        self.trace.spread_text = True
        return y

    def move(self, x: Tensor, source: Place, target: Place) -> Tensor:
        if source != target and (source[0] > 1 or target[0] > 1):
            self.trace.now.moves += size(x)
        return x

    def gather(self, x: Tensor, of: Any = "video") -> Tensor:
        self.trace.now.gathers += size(x)
        self.trace.whole.add(x.untyped_storage()._cdata)
        return x

    def scatter(self, x: Tensor, of: Any = "video") -> Tensor:
        self.trace.now.scatters += size(x)
        return x

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.trace.note_attention(q, text=self.trace.counts[1], joint=True)
        return super().attention(q, k, v)

    def skiparse_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        text = options.get("text_k")
        self.trace.note_attention(
            q, text=0 if text is None else text.shape[1], answers=options.get("text_q") is not None
        )
        return super().skiparse_attention(q, k, v, **options)


@dataclass
class Trace:
    """A forward pass in the making: ``seen[i]`` is that of block i - 1, the first and the last are the ends'."""

    model: Any
    seen: list[Seen] = field(default_factory=list)
    spread_text: bool = False
    counts: tuple[int, int] = (0, 0)  # of video and text tokens
    inside: bool = False  # of the part of a block that is recomputed
    whole: set[int] = field(default_factory=set)  # storages that are gathered for tensor parallelism
    known: dict[int, Any] = field(default_factory=dict)  # storages that are counted, or weights

    def __post_init__(self) -> None:
        for p in (*self.model.parameters(), *self.model.buffers()):
            self.known[p.untyped_storage()._cdata] = p
        self.recomputed: set[int] = set()

    @property
    def now(self) -> Seen:
        return self.seen[-1]

    def keep(self, t: Tensor) -> Tensor:
        """A tensor is saved for the backward pass; what shares its memory counts once."""
        storage = t.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage  # alive, so that no other takes its place
            now, count = self.now, float(storage.nbytes())
            if self.inside or not self.model_has_blocks:
                now.saved += count
                now.textless += 0.0 if self.has_text(t) else count
            else:
                now.outside += count
            now.gathered += count if storage._cdata in self.whole else 0.0
            now.widest = max(now.widest, count)
        return t

    def has_text(self, t: Tensor) -> bool:
        """Whether an axis of it are the text's tokens, or the video's with the text's once or in every group."""
        video, text = self.counts
        ratios = {ratio for ratio, _ in getattr(self.model, "places", [])} | {1}
        return bool({text, *(video + ratio * text for ratio in ratios)} & set(t.shape))

    @property
    def model_has_blocks(self) -> bool:
        return 0 < len(self.seen) - 1 <= len(getattr(self.model, "blocks", []))

    def note_stream(self, stream: tuple[Tensor, ...]) -> None:
        tokens = {*self.counts, sum(self.counts)}
        self.now.stream = sum(size(t) for t in stream)
        self.now.conditions = sum(size(t) for t in stream if t.dim() < 3 or t.shape[1] not in tokens)

    def note_attention(self, q: Tensor, *, text: int = 0, joint: bool = False, answers: bool = True) -> None:
        now = self.now
        now.text, now.joint, now.answers = text, joint, answers
        now.heads, now.width = q.shape[2], q.shape[2] * q.shape[3]


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


class Arithmetic(TorchDispatchMode):
    """Counts matrix products and convolutions."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.trace.now.linear += count(*args, **(kwargs or {}), out_val=result)
        return result


class Attention(TorchFunctionMode):
    """Puts shapes in the place of attention, which has no kernel on the meta device that keeps as little as others."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.OPS["attention"].overload:
            self.trace.now.attention += ops.OPS["attention"].cost(*args).flops
            return Shapes.apply(args[0].shape[1], args[1].shape[1], *args[:3])[0]
        if func is ops.OPS["skiparse_attention"].overload:
            q, k, v, ratio, _, text_q, text_k, text_v, *_, tokens = args
            # Linear in the groups; each sees all of the text.
            self.trace.now.attention += ops.OPS["skiparse_attention"].cost(*args).flops
            text = 0 if text_k is None else ratio * text_k.shape[1]
            queries = tokens + (0 if text_q is None else text)
            given = [t for t in (text_q, text_k, text_v) if t is not None]
            out = Shapes.apply(queries, tokens + text, q, k, v, *given)[0]
            return [out[:, :tokens]] + ([] if text_q is None else [out[:, tokens : tokens + text_q.shape[1]].clone()])
        return func(*args, **(kwargs or {}))


class Shapes(torch.autograd.Function):
    """Keeps queries, keys, values, the result and its log-sum-exp, of so many queries and keys."""

    @staticmethod
    def forward(ctx: Any, queries: int, keys: int, q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> tuple[Tensor]:
        def rows(t: Tensor, count: int) -> Tensor:
            return t if t.shape[1] == count else t.new_empty(t.shape[0], count, *t.shape[2:])

        out = q.new_empty(q.shape[0], queries, *q.shape[2:])
        lse = out.new_empty(q.shape[0], q.shape[2], queries, dtype=torch.float32)
        ctx.save_for_backward(rows(q, queries), rows(k, keys), rows(v, keys), out, lse)
        return (out,)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("Shapes: a traced pass has no backward")


@contextlib.contextmanager
def hooks(trace: Trace) -> Iterator[None]:
    """Watch the blocks begin and end, and the linear layers that work on tokens."""
    handles = []

    def begin(module: nn.Module, args: Any) -> None:
        trace.inside = True
        for t in args:
            if isinstance(t, Tensor) and t.requires_grad and t.untyped_storage()._cdata not in trace.recomputed:
                trace.recomputed.add(t.untyped_storage()._cdata)
                trace.known.setdefault(-len(trace.known), t)  # alive
                trace.now.inputs += size(t)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        trace.inside = False

    def spread(module: nn.Module, args: Any, output: Tensor) -> None:
        trace.now.gathers += size(output)
        trace.now.outputs += size(output)

    for block in getattr(trace.model, "blocks", []):
        handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    # Modulations are computed in parts by the tensor ranks, and gathered.
    gathered = [layer for _, layer, cut in cut_layers(trace.model) if cut is not None and cut.way == "gathered"]
    handles += [layer.register_forward_hook(spread) for layer in gathered]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace_blocks(model: Any, arguments: Mapping[str, Tensor]) -> Trace:
    """Run a transformer of :func:`build` on arguments of the meta device, block by block."""
    trace, alone, model.gradient_checkpointing = Trace(model), model.sequence, False
    model.sequence = lambda video, text: Traced(trace, video, text)
    saving = torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda t: t)
    try:
        with torch.device("meta"), hooks(trace), saving, Arithmetic(trace), Attention(trace):
            trace.seen.append(Seen())
            inputs = model.prepare(**arguments)
            stream = model.embed(inputs)
            trace.note_stream(stream)
            for index in range(len(model.blocks)):
                trace.seen.append(Seen())
                stream = model.run_block(index, stream, inputs)
                trace.note_stream(stream)
            trace.seen.append(Seen())
            model.head(stream, inputs)
    finally:
        model.sequence = alone
    return trace


def trace_whole(model: Any, *args: Any, **arguments: Any) -> Trace:
    """Run any model of :func:`build` on arguments of the meta device, as one piece."""
    trace = Trace(model)
    saving = torch.autograd.graph.saved_tensors_hooks(trace.keep, lambda t: t)
    with torch.device("meta"), saving, Arithmetic(trace), Attention(trace):
        trace.seen.append(Seen())
        model(*args, **arguments)
    return trace
