# SPDX-License-Identifier: Apache-2.0
"""The loss of a task whose model is a pipeline: cut where it calls the model.

Every stage runs the loss of every micro-batch up to that call, to learn what the model is called with. The last stage
runs it once more for each output, from the same seed, to its end. What encoders make is made once, before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vidgen.parallel.pipeline import Call, Pipeline

from .ranks import Ranks
from .tasks import GENERATOR, Task


def forward_backward(
    task: Any, pipeline: Pipeline, batches: list[dict[str, Any]], seeds: list[int], divisor: int, ranks: Ranks
) -> tuple[float, dict[str, float]]:
    """Forward and backward passes of this replica's micro-steps, as :func:`vidgen.train.steps.forward_backward`.

    All processes of the run call this.

    Returns:
        The mean loss of these micro-steps, and of its terms, on every stage.

    Raises:
        ValueError: as :meth:`vidgen.parallel.pipeline.Pipeline.step`; an encoder or the loss refuses a batch. On all
            processes.
    """
    encoded: list[dict[str, Any]] = []

    def prepare() -> list[Call]:
        for batch, seed in zip(batches, seeds, strict=True):
            encoded.append(batch if GENERATOR in batch else task.encode(batch, _draws(seed)))
        return [call_of(task, batch, _draws(seed)) for batch, seed in zip(encoded, seeds, strict=True)]

    sums: dict[str, float] = {"loss": 0.0}

    def loss(number: int, output: Tensor) -> Tensor:
        with _standing_in(task, output):
            value, terms = task.loss(encoded[number], _draws(seeds[number]))
        for name, term in {**terms, "loss": value.detach()}.items():
            sums[name] = sums.get(name, 0.0) + float(term) / len(batches)
        return value / divisor

    pipeline.step(ranks.together(prepare), loss)
    parts = dict(pipeline.from_last(sums))
    return parts.pop("loss"), parts


def call_of(task: Task, batch: dict[str, Any], generator: torch.Generator) -> Call:
    """What the task's loss calls its model with.

    Raises:
        ValueError: it does not call it.
    """
    with _standing_in(task, None):
        try:
            task.loss(batch, generator)
        except _CalledError as called:
            return called.call
    raise ValueError(f"pipeline: the loss of {type(task).__name__} must call its model")


class _CalledError(Exception):
    """Ends a loss at its call of the model."""

    def __init__(self, call: Call) -> None:
        super().__init__("the model was called")
        self.call = call


class _StandIn:
    """The model of a loss: gives the answer that is known, or ends the loss where it is asked."""

    def __init__(self, model: Any, answer: Tensor | None) -> None:
        self.model, self.answer = model, answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.answer is None:
            raise _CalledError(Call(args, kwargs))
        return self.answer


@contextlib.contextmanager
def _standing_in(task: Task, answer: Tensor | None) -> Iterator[None]:
    model = task.model
    task.model = _StandIn(model, answer)
    try:
        yield
    finally:
        task.model = model


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
