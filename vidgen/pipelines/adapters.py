# SPDX-License-Identifier: Apache-2.0
"""The transformer of a pipeline, with the adapters of low rank that were trained beside it."""

from __future__ import annotations

from typing import TypeVar

import torch

from vidgen.checkpoints.convert import adapted_weights
from vidgen.checkpoints.hf import PretrainedModel

from .folders import Parts

Model = TypeVar("Model", bound=PretrainedModel)


@torch.no_grad()
def load_transformer(cls: type[Model], parts: Parts, dtype: torch.dtype, device: torch.device) -> Model:
    """The model in ``parts.transformer``; with ``parts.lora`` its layers' weights are ``W + alpha / r * B A``.

    The sums are formed in float32 from the weights in their file, and then brought into ``dtype``.

    Raises:
        ValueError: adapters that do not fit the model, or that do not say their alpha.
    """
    model = cls.from_pretrained(parts.transformer, dtype=dtype, device=device)
    if parts.lora is not None:
        state = model.state_dict()
        for name, weight in adapted_weights(parts.transformer, parts.lora).items():
            state[name].copy_(weight.load())
    return model
