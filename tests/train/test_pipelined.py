# SPDX-License-Identifier: Apache-2.0
"""Losses that are cut at their call of the model give the same number, and ask their encoders once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.parallel.pipeline import Call
from vidgen.train import pipelined
from vidgen.train.ranks import Ranks
from vidgen.train.tasks import build_task

from .test_systems import make, texts, vaes  # noqa: F401


class OneStage:
    """A pipeline of one stage: runs whole micro-batches, the last first."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[Call] = []

    def step(self, calls: list[Call], loss: Callable[[int, Tensor], Tensor]) -> None:
        self.calls = calls
        for number, call in reversed(list(enumerate(calls))):
            loss(number, self.model(*call.args, **call.kwargs)).backward()

    def from_last(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize("case", ["1.3 inpaint", "1.5", "2.0 conditions", "5B", "1.5-5B-I2V"])
def test_cut_losses(make: Any, make_recipe: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    recipe = make_recipe("dit") if case == "1.5" else make(case)
    task: Any = build_task(recipe, torch.device("cpu"))
    model, encoded = task.model, []
    monkeypatch.setattr(task.vae, "encode_moments", noted(task.vae.encode_moments, encoded))
    batches, seeds = [next(task.samples(0)) for _ in range(2)], [7, 8]

    wanted = [
        task.loss(dict(batch), torch.Generator().manual_seed(s))[0] for batch, s in zip(batches, seeds, strict=True)
    ]
    (sum(wanted) / 2).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    once = len(encoded)
    assert once >= 2

    pipeline = OneStage(model)
    loss, parts = pipelined.forward_backward(task, pipeline, batches, seeds, 2, Ranks())  # type: ignore[arg-type]
    assert loss == pytest.approx(float(sum(wanted).detach()) / 2, rel=1e-6) and parts == {}
    assert len(encoded) == 2 * once
    assert len(pipeline.calls) == 2 and task.model is model
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-7)


def noted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options)

    return call


def test_a_loss_without_a_model() -> None:
    class Constant:
        model = None

        def loss(self, batch: Any, generator: Any) -> Any:
            return torch.zeros(()), {}

    with pytest.raises(ValueError, match="the loss of Constant must call its model"):
        pipelined.call_of(Constant(), {}, torch.Generator())  # type: ignore[arg-type]
