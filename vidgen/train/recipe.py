# SPDX-License-Identifier: Apache-2.0
"""The recipe of a training run: what a YAML file under ``configs/`` may say, with defaults and checks.

Defaults are those of the Open-Sora Plan v1.5 release where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vidgen import config
from vidgen.checkpoints.hf import read_config
from vidgen.parallel import Parallel
from vidgen.pipelines.folders import NEEDED, weights_folder

from . import cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2
from .lora import Lora
from .vae_loss import VAELossConfig

# A system is a module with the same names in each; see that of Open-Sora Plan 1.5.
SYSTEMS: dict[str, Any] = {
    "opensora_plan_v1_3": opensora_plan_v1_3,
    "opensora_plan_v1_5": opensora_plan_v1_5,
    "opensora_v2": opensora_v2,
    "cogvideox": cogvideox,
}


@dataclass
class Data:
    """Clips and how they are cut: ``num_frames`` frames at ``fps``, resized and centre-cropped."""

    path: Path
    num_frames: int
    height: int
    width: int
    fps: float | None = None  # None keeps each clip's own rate
    num_workers: int = 0
    cache: Path | None = None  # where latents and text embeddings are kept; each clip is then encoded once
    max_broken_fraction: float = 0.02

    def validate(self) -> list[str]:
        problems = list(_positive(self, "height", "width", "num_frames"))
        if self.fps is not None and self.fps <= 0:
            problems.append(f"fps must be positive, got {self.fps}")
        if self.num_workers < 0:
            problems.append(f"num_workers must not be negative, got {self.num_workers}")
        if not 0 <= self.max_broken_fraction <= 1:
            problems.append(f"max_broken_fraction must lie in [0, 1], got {self.max_broken_fraction}")
        return problems


@dataclass
class Optimizer:
    """AdamW with an average of the weights; the rate rises over ``warmup_steps``, then stays or falls as a cosine."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 1e-4
    ema_decay: float | None = 0.9999
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_fraction: float = 0.0  # of lr, where the cosine ends

    def validate(self) -> list[str]:
        problems = list(_not_negative(self, "lr", "eps", "weight_decay", "warmup_steps", "final_lr_fraction"))
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay must lie in [0, 1) or be null, got {self.ema_decay}")
        return problems


@dataclass
class Clipping:
    """Gradient clipping: a threshold that follows the norm ("adaptive"), a fixed one ("norm"), or none."""

    method: Literal["adaptive", "norm", "none"] = "adaptive"
    decay: float = 0.99  # of the statistics of "adaptive"
    max_norm: float = 1.0  # of "norm"

    def validate(self) -> list[str]:
        problems = list(_positive(self, "max_norm"))
        if not 0 < self.decay < 1:
            problems.append(f"decay must lie in (0, 1), got {self.decay}")
        return problems


@dataclass
class Training:
    """Length and shape of the run. One optimizer step sees ``batch_size * accumulation`` samples."""

    steps: int
    batch_size: int = 1
    accumulation: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_skipped_steps: int = 3  # that many steps in a row without a usable gradient end the run
    max_failed_saves: int = 3  # that many failed checkpoints in a row end the run

    def validate(self) -> list[str]:
        names = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints")
        return list(_positive(self, *names, "max_skipped_steps", "max_failed_saves"))


@dataclass
class Text:
    """Folders of the two text encoders, and how captions enter."""

    t5: Path | None = None
    clip: Path | None = None
    t5_max_length: int = 512
    clip_max_length: int = 77
    caption_dropout: float = 0.1  # the caption is replaced by an empty one, for both encoders together

    def validate(self) -> list[str]:
        problems = list(_positive(self, "t5_max_length", "clip_max_length"))
        if not 0 <= self.caption_dropout <= 1:
            problems.append(f"caption_dropout must lie in [0, 1], got {self.caption_dropout}")
        return problems


@dataclass
class Encoders:
    """When and where clips and captions are encoded while a DiT is trained; samples and losses do not depend on it."""

    data_parallel: bool = True  # processes that share samples encode different ones and exchange what comes out
    interval: int | None = None  # micro-steps each encodes ahead, after which the encoders leave the device; null: stay

    def validate(self) -> list[str]:
        return [] if self.interval is None else list(_positive(self, "interval"))


@dataclass
class Recipe:
    """A whole run. ``task`` says what is trained: the "vae", or the "dit" on latents of a finished VAE.

    ``model`` holds a ``preset`` and any field of the model's configuration, which overrides the preset, or
    ``pretrained``: a folder to start from. What ``diffusion`` may hold is the system's.
    """

    task: Literal["vae", "dit"]
    output: Path
    data: Data
    training: Training
    system: str = "opensora_plan_v1_5"
    model: dict[str, Any] = field(default_factory=dict)
    vae: Path | None = None  # folder of the VAE, or of the run that trained it; only for "dit"
    text: Text = field(default_factory=Text)
    encoders: Encoders = field(default_factory=Encoders)  # only for "dit"
    diffusion: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)  # weights of the VAE's loss
    optimizer: Optimizer = field(default_factory=Optimizer)
    clipping: Clipping = field(default_factory=Clipping)
    lora: Lora | None = None  # None: all weights are trained
    parallel: Parallel | None = None  # None: one process, or shards over all that torchrun has started
    seed: int = 0
    device: str = "auto"

    def validate(self) -> list[str]:
        if self.system not in SYSTEMS:
            return [f"system: wanted one of {', '.join(SYSTEMS)}, got {self.system!r}"]
        problems = list(_size_problems(self))
        if self.task == "dit":
            given = {"vae": self.vae, "t5": self.text.t5, "clip": self.text.clip}
            missing = [name for name in NEEDED[self.system] if given[name] is None]
            names = [name if name == "vae" else f"text.{name}" for name in missing]
            problems += [f"{name}: missing; training a dit needs it" for name in names]
        elif self.encoders != Encoders():
            problems.append("encoders: only the training of a dit has encoders")
        if self.lora is not None:
            problems += self.lora.parallel_problems(self.parallel)
            problems += [] if self.task == "dit" else ["lora: only a dit is trained by adapters"]
        if self.seed < 0:
            problems.append(f"seed: must not be negative, got {self.seed}")
        for build in (model_config, vae_loss_config, diffusion_options):
            try:
                build(self)
            except config.ConfigError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(str(error))
        return problems


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML or JSON, with dotted overrides. Raises ConfigError with all problems at once."""
    return config.load(Recipe, source, overrides or ())


def model_config(recipe: Recipe) -> Any:
    """The model's configuration: that of ``model.pretrained``, or ``model.preset`` changed by the other fields.

    Raises:
        ConfigError: unknown preset, unknown fields or wrong values, each with its dotted path.
        ValueError: ``model.pretrained`` holds no such model.
    """
    system = SYSTEMS[recipe.system]
    presets: dict[str, Any] = system.VAE_PRESETS if recipe.task == "vae" else system.PRESETS
    if not presets:
        raise config.ConfigError([f"task: the vae of {recipe.system} is not trained here"])
    fields = dict(recipe.model)
    if "pretrained" in fields:
        folder = fields.pop("pretrained")
        if fields:
            raise config.ConfigError([f"model.{name}: cannot be combined with pretrained" for name in fields])
        return read_config(model_class(recipe), weights_folder(folder))
    name = fields.pop("preset", None)
    if name is not None and name not in presets:
        raise config.ConfigError([f"model.preset: wanted one of {', '.join(presets)}, got {name!r}"])
    base = config.to_dict(presets[name]) if name is not None else {}
    return _load_section(model_class(recipe).config_class, base | fields, "model")


def model_class(recipe: Recipe) -> Any:
    """The class that the task trains."""
    system = SYSTEMS[recipe.system]
    return system.VAE if recipe.task == "vae" else system.transformer_class(recipe.model)


def vae_config(recipe: Recipe) -> Any:
    """The configuration of the VAE: the one that is trained, or that of its folder; None where there is none yet."""
    if recipe.task == "vae":
        return model_config(recipe)
    if recipe.vae is None or not recipe.vae.is_dir():
        return None
    return SYSTEMS[recipe.system].read_vae_config(weights_folder(recipe.vae))


def diffusion_options(recipe: Recipe) -> Any:
    """The system's options of its loss. Raises ConfigError."""
    return _load_section(SYSTEMS[recipe.system].Options, recipe.diffusion, "diffusion")


def vae_loss_config(recipe: Recipe) -> Any:
    """The weights of the VAE's loss. Raises ConfigError."""
    if recipe.task != "vae" and recipe.loss:
        raise config.ConfigError([f"loss.{name}: only a vae has a loss to configure" for name in recipe.loss])
    return _load_section(VAELossConfig, recipe.loss, "loss")


def _size_problems(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    try:
        factor, side = SYSTEMS[recipe.system].vae_factors(vae_config(recipe))
    except config.ConfigError:  # told by the model's own check
        return
    if (data.num_frames - 1) % factor:
        yield f"data: num_frames must be {factor}n+1, got {data.num_frames}"
    if data.height % side or data.width % side:
        yield f"data: height and width must be multiples of {side}, got {data.height} and {data.width}"


def _load_section(cls: type, values: dict[str, Any], path: str) -> Any:
    try:
        return config.load(cls, values)
    except config.ConfigError as error:
        raise config.ConfigError([f"{path}.{problem}" for problem in error.problems]) from error


def _positive(section: Any, *names: str) -> Iterator[str]:
    for name in names:
        if not getattr(section, name) > 0:
            yield f"{name} must be positive, got {getattr(section, name)}"


def _not_negative(section: Any, *names: str) -> Iterator[str]:
    for name in names:
        if getattr(section, name) < 0:
            yield f"{name} must not be negative, got {getattr(section, name)}"
