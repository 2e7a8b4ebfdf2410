# SPDX-License-Identifier: Apache-2.0
"""What the planner needs to know about a recipe's model: read off the model itself, without weights or data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from vidgen.checkpoints.lazy import read_safetensors
from vidgen.parallel import Parallel
from vidgen.parallel import plan as planning
from vidgen.parallel.facts import Amount, ModelFacts, ModelShape, Step
from vidgen.parallel.tensor import cut_layers
from vidgen.parallel.timing import Machine
from vidgen.pipelines.folders import weights_folder

from .lora import add_adapters
from .recipe import SYSTEMS, Recipe, model_class, model_config, vae_config
from .tracing import Seen, Trace, build, trace_blocks, trace_whole

AMOUNTS = (
    "linear",
    "saved",
    "gathered",
    "outside",
    "inputs",
    "stream",
    "gathers",
    "scatters",
    "moves",
    "joins",
    "widest",
)


def shape_of(recipe: Recipe) -> ModelShape:
    """Heads, blocks, tokens and Skiparse ratios of a recipe: what says which combinations are legal."""
    config = model_config(recipe)
    if recipe.task == "vae":
        return ModelShape(heads=0, blocks=0, tokens=0)
    model: Any = build(model_class(recipe), config, torch.float32)
    ratios = {ratio for ratio, _ in getattr(model, "places", [])} | {1}
    heads = next(getattr(config, name) for name in ("num_heads", "num_attention_heads") if hasattr(config, name))
    tokens = SYSTEMS[recipe.system].tokens(config, latent_of(recipe))
    return ModelShape(heads, len(model.blocks), tokens, tuple(sorted(ratios)), adapters=recipe.lora is not None)


def require_legal(recipe: Recipe, world: int) -> list[str]:
    """Check the section ``parallel`` against the model, before anything is loaded. The same on all ranks.

    Returns:
        What is legal and wasteful.

    Raises:
        ValueError: everything that is wrong with it, each with the nearest way that works.
    """
    shape, parallel, accumulation = shape_of(recipe), recipe.parallel or Parallel(), recipe.training.accumulation
    if problems := planning.check(shape, parallel, world, accumulation=accumulation):
        raise ValueError("recipe: " + "; ".join(problems))
    return planning.warnings(shape, parallel, accumulation=accumulation)


def latent_of(recipe: Recipe) -> tuple[int, int, int]:
    """Frames, rows and columns of the latent."""
    factor, side = SYSTEMS[recipe.system].vae_factors(vae_config(recipe))
    return (recipe.data.num_frames - 1) // factor + 1, recipe.data.height // side, recipe.data.width // side


def facts_of(recipe: Recipe) -> ModelFacts:
    """Everything that a plan is computed from.

    Two forward passes on the meta device, of which the second has fewer frames, tell what grows with the video.

    Raises:
        ValueError: the model does not take such samples.
    """
    training, config = recipe.training, model_config(recipe)
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    model: Any = build(model_class(recipe), config, dtype)
    if recipe.lora is not None:
        add_adapters(model, recipe.lora)
        model.to(dtype)
    common: dict[str, Any] = {
        "element": dtype.itemsize,
        "batch": training.batch_size,
        "accumulation": training.accumulation,
        "recomputed": training.activation_checkpointing,
        "states": 2 if recipe.optimizer.ema_decay is None else 3,
        "resident_bytes": resident_bytes(recipe, dtype),
    }
    if recipe.task == "vae":
        return vae_facts(recipe, model, dtype, common)
    system, latent, text = SYSTEMS[recipe.system], latent_of(recipe), recipe.text.t5_max_length
    fewer = (max(1, latent[0] // 2), *latent[1:])
    given = [arguments(system, config, frames, text, dtype) for frames in (latent, fewer)]
    counts = [system.tokens(config, frames) for frames in (latent, fewer)]
    name = f"{recipe.system}, {latent_text(recipe)}"
    return transformer_facts(model, given, counts, name=name, text=text, **common)


def transformer_facts(
    model: Any, given: Sequence[dict[str, torch.Tensor]], counts: Sequence[int], *, name: str, text: int, **common: Any
) -> ModelFacts:
    """Of a model on the meta device, from its arguments for one sample and for the same with fewer frames; ``counts``
    are the video tokens of both."""
    trace = trace_blocks(model, given[0])
    other = trace_blocks(model, given[1]) if counts[1] < counts[0] else None
    places = [(1, "single"), *getattr(model, "places", [(1, "single")] * len(model.blocks)), (1, "single")]
    steps = []
    for index, (seen, place) in enumerate(zip(trace.seen, places, strict=True)):
        less = None if other is None else other.seen[index]
        amounts = {name: amount(name, seen, less, *counts) for name in AMOUNTS}
        steps.append(step_of(seen, count_parameters(model, index - 1), place, amounts))
    attending = next(seen for seen in trace.seen if seen.text is not None)
    adapters = not all(p.requires_grad for p in model.parameters())
    ratios = tuple(sorted({ratio for ratio, _ in places}))
    return ModelFacts(
        name=name,
        shape=ModelShape(attending.heads, len(model.blocks), counts[0], ratios, adapters),
        width=attending.width,
        text=text,
        spread_text=trace.spread_text,
        before=steps[0],
        blocks=tuple(steps[1:-1]),
        after=steps[-1],
        # latent, noise and target in float32 beside what the model is given
        input_bytes=12.0 * sum(t.numel() for t in given[0].values()),
        **common,
    )


def plan(recipe: Recipe, world: int, machine: Machine, samples: int | None = None) -> planning.Plan:
    """What ``vidgen plan`` prints: see :func:`vidgen.parallel.plan.search`.

    Raises:
        ValueError: fewer than one process or sample.
    """
    for name, count in (("world", world), ("samples", 1 if samples is None else samples)):
        if count < 1:
            raise ValueError(f"plan: {name} must be positive, got {count}")
    return planning.make_plan(facts_of(recipe), world, machine, recipe.parallel, samples)


def latent_text(recipe: Recipe) -> str:
    return " x ".join(str(n) for n in (recipe.data.num_frames, recipe.data.height, recipe.data.width))


def arguments(system: Any, config: Any, latent: Any, text: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return {name: t.to(dtype) for name, t in system.arguments(config, latent, text).items()}


def amount(name: str, seen: Seen, less: Seen | None, tokens: int, fewer: int) -> Amount:
    """What grows with the tokens belongs to the video; the rest to the text, but for what has no tokens,
    such as weights in another precision."""
    total = getattr(seen, name)
    if less is None:
        return Amount(total)

    def growing(what: str) -> float:
        return (getattr(seen, what) - getattr(less, what)) / (tokens - fewer) * tokens

    video = growing(name)
    no_tokens = {"saved": seen.textless - growing("textless"), "gathers": seen.outputs, "stream": seen.conditions}
    fixed = no_tokens.get(name, 0.0)
    return Amount(video, total - video - fixed, fixed)


def count_parameters(model: Any, index: int) -> dict[str, int]:
    """Of a block, or of what comes before the first (-1) or after the last: all, those that are trained, and those that
    tensor parallelism cuts."""
    own = [(name, p) for name, p in model.named_parameters() if model.step_of(name) == index]
    cut: set[str] = set()
    for name, _, how in cut_layers(model):
        if how is not None:  # the bias of a layer that is cut by rows is whole
            cut |= {f"{name}.weight"} | ({f"{name}.bias"} if how.way != "row" else set())
    return {
        "parameters": sum(p.numel() for _, p in own),
        "trainable": sum(p.numel() for _, p in own if p.requires_grad),
        "cut": sum(p.numel() for name, p in own if name in cut),
    }


def step_of(seen: Seen, counts: dict[str, int], place: tuple[int, str], amounts: dict[str, Amount]) -> Step:
    values: dict[str, Any] = {**counts, **amounts}
    return Step(
        attention=seen.attention,
        text=seen.text,
        joint=seen.joint,
        answers=seen.answers,
        ratio=place[0],
        pattern=place[1],
        **values,
    )


def vae_facts(recipe: Recipe, model: Any, dtype: torch.dtype, common: dict[str, Any]) -> ModelFacts:
    """A VAE is one piece: nothing in it is divided among processes but its parameters."""
    data = recipe.data
    with torch.device("meta"):
        video = torch.zeros(1, 3, data.num_frames, data.height, data.width, dtype=dtype)
        noise = torch.zeros(1, model.config.latent_dim, *latent_of(recipe), dtype=dtype)
    trace: Trace = trace_whole(model, video, noise=noise)
    (seen,) = trace.seen
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    counts = {"parameters": sum(p.numel() for p in parameters), "trainable": sum(p.numel() for p in trained)}
    amounts = {name: Amount(fixed=getattr(seen, name)) for name in AMOUNTS}
    return ModelFacts(
        name=f"vae of {recipe.system}, {latent_text(recipe)}",
        shape=ModelShape(0, 0, 0),
        width=0,
        text=0,
        spread_text=False,
        before=step_of(dataclasses.replace(seen, text=None), counts, (1, "single"), amounts),
        blocks=(),
        after=Step(),
        input_bytes=4.0 * video.numel(),
        **{**common, "recomputed": False},
    )


def resident_bytes(recipe: Recipe, dtype: torch.dtype) -> float | None:
    """Bytes of the VAE and the text encoders of a run, which every process holds while the transformer computes; None
    where their safetensors are not here.

    With ``encoders.interval`` they are on the host then, and with ``data.cache`` gone, but for a VAE that is used at
    each step.
    """
    if recipe.task == "vae" or recipe.encoders.interval is not None:
        return 0.0
    encoders = [recipe.text.t5, recipe.text.clip] if recipe.data.cache is None else []
    vae = [recipe.vae] if encoders or SYSTEMS[recipe.system].needs_video(model_config(recipe)) else []
    folders = [folder for folder in (*vae, *encoders) if folder is not None]
    if not all(folder.is_dir() for folder in folders):
        return None
    # others are copies, such as model.fp16.safetensors
    files = [[f for f in weights_folder(folder).glob("*.safetensors") if "." not in f.stem] for folder in folders]
    if not all(files):
        return None
    numbers = sum(math.prod(t.shape) for each in files for file in each for t in read_safetensors(file).values())
    return float(numbers * dtype.itemsize)
