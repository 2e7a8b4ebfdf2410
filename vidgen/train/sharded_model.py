# SPDX-License-Identifier: Apache-2.0
"""The model of a run that is spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vidgen import config
from vidgen.checkpoints.distributed import MODEL_FILE, is_distributed
from vidgen.checkpoints.hf import PretrainedModel, read_config
from vidgen.io import read_json
from vidgen.parallel import Parallel
from vidgen.parallel.context import spread
from vidgen.parallel.pipeline_stages import keep_steps, own_chunks
from vidgen.parallel.sharding import fill, shard_model, tensors_of
from vidgen.parallel.tensor import row_order, tensor_parallel

from . import lora
from .ranks import Ranks
from .recipe import Recipe, model_class, model_config
from .tasks import build_model

FORWARD_METHODS = ("encode_moments",)  # what tasks call on a model beside forward


def build_sharded(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, found: Path | None, *, ranks: Ranks
) -> PretrainedModel:
    """The same model as :func:`vidgen.train.tasks.build_model` makes, in shards of float32 that compute in ``dtype``.

    The first rank makes the whole model on its host and sends it tensor by tensor; the others never hold one. Where
    there is a checkpoint ``found`` to go on from, the shards are left empty: each rank reads its own from there.
    """
    layout, parallel = ranks.layout, recipe.parallel or Parallel()
    assert layout is not None
    with torch.device("meta"):
        model = model_class(recipe)(found_config(recipe, found))
    templates = {name: t.detach() for name, t in tensors_of(model).items()}
    model.requires_grad_(True)
    if recipe.lora is not None:
        lora.add_adapters(model, recipe.lora)
        templates = {name: t.detach() for name, t in tensors_of(model).items()}
    tensor_parallel(model, layout)
    if layout.size("sequence") > 1:
        spread(model, layout, parallel.skiparse)
    if layout.size("pipeline") > 1:
        keep_steps(model, own_chunks(model, layout, parallel))
    shard_model(
        model,
        layout,
        param_dtype=dtype,
        # A pipeline has other micro-batches between the passes of one: its stages are gathered once for all.
        reshard_after_forward=parallel.reshard_after_forward and layout.size("pipeline") == 1,
        cpu_offload=parallel.cpu_offload,
        forward_methods=[name for name in FORWARD_METHODS if hasattr(model, name)],
    )
    model.to_empty(device="cpu" if parallel.cpu_offload else device)
    if found is None or recipe.lora is not None:  # a checkpoint has adapters alone
        whole = ranks.together(
            lambda: build_model(recipe, torch.device("cpu"), torch.float32, None) if ranks.is_first else None
        )
        fill(model, None if whole is None else tensors_of(whole), templates, layout, row_order(model))
        torch.manual_seed(recipe.seed)  # the first rank has drawn weights, the others have not
    return model


def build_unfilled(recipe: Recipe, device: torch.device, dtype: torch.dtype, found: Path | None) -> PretrainedModel:
    """The whole model for a checkpoint of many processes, which is still to be read."""
    if recipe.lora is not None:
        return build_model(recipe, device, dtype, None)
    return model_class(recipe)(found_config(recipe, found)).to(device, dtype).requires_grad_(True)


def saved_part(recipe: Recipe, model: Any) -> Any:
    """What of a model stands in checkpoints: all of it, or its adapters."""
    return model if recipe.lora is None else lora.Adapters(model)


def trained_names(recipe: Recipe, model: PretrainedModel) -> list[str]:
    """The trained parameters of the whole model in their order; a stage of a pipeline has some of them."""
    if recipe.lora is not None:
        return [name for name, _ in lora.Adapters(model).named_parameters()]
    with torch.device("meta"):
        whole = model_class(recipe)(model.config)
    return [name for name, _ in whole.named_parameters()]


def found_config(recipe: Recipe, found: Path | None) -> Any:
    """The configuration of the model in a checkpoint of one process or of many; without one, the recipe's."""
    cls = model_class(recipe)
    if found is None or recipe.lora is not None:
        return model_config(recipe)
    if not is_distributed(found):
        return read_config(cls, found / "model")
    fields = read_json(found / MODEL_FILE)
    return config.load(cls.config_class, {name: value for name, value in fields.items() if not name.startswith("_")})
