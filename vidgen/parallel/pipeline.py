# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: consecutive blocks on different ranks, by the schedules of torch.distributed.pipelining.

All ranks of a replica are given the same samples and draw the same numbers, so each stage prepares a micro-batch by
itself and only the stream of hidden states travels; the last stage makes the target of the loss in the same way.

Stages exchange tensors of fixed shapes through buffers of their own. There is a set of them, with its schedule, for
each bucket of shapes, and all ranks agree on the bucket before a step: shapes that differ would end the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from .agree import together
from .layout import Layout, Parallel
from .pipeline_stages import all_chunks, micro_batch_problems, own_chunks

MAX_BUCKETS = 8  # whose buffers are kept; of more, the one that was used least recently is dropped
Stream = tuple[Tensor, ...]
Shapes = list[tuple[tuple[int, ...], torch.dtype]]  # of the tensors of a stream


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Pipeline:
    """The stages of this rank, and steps over all of them.

    Args:
        model: has the parameters of this rank's steps alone (:func:`vidgen.parallel.pipeline_stages.keep_steps`), in
            shards or not.
        layout: of all ranks.
        parallel: says which blocks are where, and the schedule.
        device: of the stream; default: the current one of the layout's type.

    Raises:
        ValueError: the model has no blocks, or ``parallel`` does not fit them.
    """

    def __init__(self, model: Any, layout: Layout, parallel: Parallel, device: torch.device | None = None) -> None:
        self.model, self.layout, self.parallel = model, layout, parallel
        self.device = device or torch.device(layout.mesh.device_type)
        self.own = own_chunks(model, layout, parallel)
        self.chunks = all_chunks(len(model.blocks), parallel)
        self.buckets: dict[str, Any] = {}
        self.calls: Sequence[Call] = ()
        self.inputs: dict[int, Any] = {}  # of the micro-batches that are under way, by number
        self.loss: Callable[[int, Tensor], Tensor] | None = None
        self.backwards_left = 0
        model.run_steps = self._run_steps
        register_fsdp_forward_method(model, "run_steps")

    def step(self, calls: Sequence[Call], loss: Callable[[int, Tensor], Tensor]) -> None:
        """Forward and backward passes of all micro-batches; gradients are added to those of the parameters.

        All ranks of the layout call this together.

        Args:
            calls: what the model is to be called with, for each micro-batch; all of the same shapes.
            loss: of number and output of a micro-batch, what the backward pass begins with; called on the last stage
                alone, in any order.

        Raises:
            ValueError: on all ranks, if the micro-batches differ in shape, the stages do not agree on it, the model
                refuses its inputs, or the schedule takes no such number of micro-batches.
        """
        bucket, unknown = self._agree(calls)
        self.calls, self.loss = calls, loss
        self.backwards_left = len(calls) * len(self.own)
        self._synchronize_gradients(False)
        try:
            schedule = self.buckets.pop(bucket, None)
            if unknown:
                schedule = self._schedule(len(calls), self._shapes())
            self.buckets[bucket] = schedule  # the last one is the newest
            if len(self.buckets) > MAX_BUCKETS:
                del self.buckets[next(iter(self.buckets))]
            numbers = torch.arange(len(calls))
            ends = {"target": numbers} if self.own[-1].last else {}
            schedule.step(number=numbers, return_outputs=False, **ends)
        finally:
            self.calls, self.loss, self.inputs = (), None, {}
            self._synchronize_gradients(True)

    def sum(self, number: float) -> float:
        """The sum of a number over the stages, which call this together."""
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total, group=self.layout.group("pipeline"))
        return float(total)

    def from_last(self, value: Any) -> Any:
        """A small value of the last stage, on all stages of this replica, which call this together."""
        answer = [value]
        group, last = self.layout.group("pipeline"), self.layout.size("pipeline") - 1
        dist.broadcast_object_list(answer, group=group, group_src=last)
        return answer[0]

    # Agreement

    def _agree(self, calls: Sequence[Call]) -> tuple[str, bool]:
        """Name of the bucket of these calls, and whether a rank of the layout has not met its own yet."""
        described, problem = [shapes_of(call) for call in calls], self._problem(calls)
        if problem is None and (other := next((d for d in described if d != described[0]), None)):
            problem = (
                "pipeline: all micro-batches of a step must have the same shapes, got "
                f"{described[0]} for one and {other} for another"
            )
        bucket = f"{len(calls)} x {described[0] if described else None}"
        digest = int.from_bytes(hashlib.sha256(bucket.encode()).digest()[:7], "little")
        extremes = torch.tensor([digest, -digest])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, self.layout.group("pipeline"))
        differs = bool(extremes.sum())
        flags = torch.tensor([problem is not None or differs, bucket not in self.buckets], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.layout.group("world"))
        if flags[0]:
            self._refuse(problem, bucket if differs else None)
        return bucket, bool(flags[1])

    def _problem(self, calls: Sequence[Call]) -> str | None:
        if not calls:
            return "pipeline: a step must have micro-batches, got none"
        if problems := micro_batch_problems(self.parallel, len(calls)):
            return problems[0]
        try:
            self.inputs[0] = self.model.prepare(*calls[0].args, **calls[0].kwargs)
        except Exception as error:  # to be raised on all ranks
            return str(error) or type(error).__name__
        return None

    def _refuse(self, problem: str | None, bucket: str | None) -> None:
        """Raise the same error on all ranks: what one of them found, or in what the stages differ."""
        self.inputs = {}

        def own_shapes() -> tuple[int, str | None]:
            if problem is not None:
                raise ValueError(problem)
            return self.layout.rank("pipeline"), bucket

        found = together(own_shapes, self.layout.group("world"))
        stages = dict.fromkeys(f"stage {stage}: {shapes}" for stage, shapes in found if shapes is not None)
        raise ValueError(f"pipeline: all stages must have the same shapes, got {'; '.join(stages)}")

    # Shapes and schedules

    @torch.no_grad()
    def _shapes(self) -> list[Shapes]:
        """Of what every chunk returns, found by passing zeros through all of them once."""
        found: list[Shapes] = []
        for chunk in self.chunks:
            answer: list[Any] = [None]
            if chunk in self.own:
                stream = [torch.zeros(s, dtype=dtype, device=self.device) for s, dtype in (found[-1] if found else ())]
                answer = [[(tuple(t.shape), t.dtype) for t in self.model.run_steps(chunk.number, 0, *stream)]]
            owner = chunk.number % self.parallel.pipeline
            dist.broadcast_object_list(answer, group=self.layout.group("pipeline"), group_src=owner)
            found.append(answer[0])
        return found

    def _schedule(self, micro_batches: int, shapes: list[Shapes]) -> Any:
        streams = [(), *(tuple(_example(shape, dtype) for shape, dtype in stream) for stream in shapes)]
        stages: list[Any] = []
        for chunk in self.own:
            stage = _Stage(
                _Steps(self.model, chunk.number),
                chunk.number,
                chunk.count,
                self.device,
                input_args=streams[chunk.number],
                output_args=streams[chunk.number + 1],
                group=self.layout.group("pipeline"),
            )
            stage.begin_backward = self._begin_backward
            stages.append(stage)
        options: dict[str, Any] = {"n_microbatches": micro_batches, "loss_fn": self._loss, "scale_grads": False}
        forward_first = self.parallel.schedule == "gpipe"
        if len(stages) > 1 or micro_batches < self.parallel.pipeline:
            # With one stage on each rank these are the two below, which refuse fewer micro-batches than stages.
            return (ScheduleLoopedBFS if forward_first else ScheduleInterleaved1F1B)(stages, **options)
        return (ScheduleGPipe if forward_first else Schedule1F1B)(stages[0], **options)

    # What the schedule calls

    def _run_steps(self, chunk_number: int, number: int, *stream: Tensor) -> Stream:
        """A chunk of micro-batch ``number``, forward."""
        model, chunk, call = self.model, self.chunks[chunk_number], self.calls[number]
        if number not in self.inputs:
            self.inputs[number] = model.prepare(*call.args, **call.kwargs)
        inputs = self.inputs[number]
        if torch.is_grad_enabled() and chunk == self.own[-1]:
            del self.inputs[number]  # blocks that are computed again hold what they need
        if chunk.first:
            stream = model.embed(inputs)
        for index in chunk.blocks:
            stream = model.run_block(index, stream, inputs)
        if chunk.last:
            stream = (model.head(stream, inputs),)
        return tuple(_own_memory(t) for t in stream)

    def _loss(self, outputs: Stream, number: Tensor) -> Tensor:
        assert self.loss is not None
        return self.loss(int(number), outputs[0])

    def _begin_backward(self) -> None:
        self.backwards_left -= 1
        if self.backwards_left == 0:
            self._synchronize_gradients(True)

    def _synchronize_gradients(self, flag: bool) -> None:
        """Whether the next backward pass adds gradients up over ranks and frees whole parameters."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(flag)
            self.model.set_reshard_after_backward(flag)
            self.model.set_is_last_backward(flag)


class _Steps(nn.Module):
    """A chunk as a module without parameters: what torch does with modules in shards is done by `Pipeline` instead, for
    all chunks of a rank together."""

    def __init__(self, model: Any, chunk_number: int) -> None:
        super().__init__()
        self.run = lambda *args: model.run_steps(chunk_number, *args)  # hides the model from modules()

    def forward(self, *stream: Tensor, number: Tensor) -> Stream:
        return self.run(int(number), *(_Arrive.apply(*stream) if stream else ()))


class _Arrive(torch.autograd.Function):
    """The stream as it comes in. Tensors that no loss reaches get gradients of zero, which the sender waits for, and
    those that only pass through leave as tensors of their own."""

    @staticmethod
    def forward(ctx: Any, *stream: Tensor) -> Any:
        return tuple(t.detach() for t in stream)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(grad.contiguous() for grad in grads)


class _Stage(PipelineStage):
    begin_backward: Callable[[], None]

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        self.begin_backward()
        return super().backward_one_chunk(*args, **kwargs)


def shapes_of(call: Call) -> str:
    """Shapes and dtypes of everything in a call, as text."""

    def described(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, tuple | list):
            return f"({', '.join(map(described, value))})"
        return type(value).__name__

    named = [f"{name} {described(value)}" for name, value in sorted(call.kwargs.items())]
    return ", ".join([*map(described, call.args), *named])


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _own_memory(t: Tensor) -> Tensor:
    """Contiguous, and not a view that would keep a larger tensor alive."""
    return t if t.is_contiguous() and t._base is None else t.clone(memory_format=torch.contiguous_format)
