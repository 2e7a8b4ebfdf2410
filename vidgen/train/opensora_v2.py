# SPDX-License-Identifier: Apache-2.0
"""Training of Open-Sora 2.0: flow matching under T5 and CLIP, now and then with first or last frames given.

The names are those of `vidgen.train.opensora_plan_v1_5`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.diffusion.opensora_v2_conditions import CONDITION_TYPES, choose_condition, training_condition
from vidgen.diffusion.opensora_v2_loss import batch_loss, drop_text, training_inputs
from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE as VAE
from vidgen.models.autoencoders.hunyuan_vae_config import HunyuanVAEConfig
from vidgen.models.opensora_v2 import PRESETS, MMDiT, MMDiTConfig
from vidgen.models.text import opensora_v2_training_caption
from vidgen.pipelines.opensora_v2 import encode_text, load_encoders, load_vae, read_vae_config

if TYPE_CHECKING:
    from .features import Features
    from .recipe import Recipe
    from .tasks import DiTTask

__all__ = ["PRESETS", "VAE", "encode_text", "load_encoders", "load_vae", "read_vae_config"]

DROPPED = ("",)  # what stands for a caption that is left out
VAE_PRESETS: dict[str, Any] = {}  # it is not trained here


@dataclass
class Options:
    """How often which frames are given, relative to each other, and what of the loss counts."""

    conditions: dict[str, float] = field(
        default_factory=lambda: {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 1.0}
    )
    reference_loss: bool = True  # False: first and last frames that are given do not count
    guidance: float = 4.0  # what a model with guidance_embed is told

    def validate(self) -> list[str]:
        unknown = [name for name in self.conditions if name not in CONDITION_TYPES]
        problems = [f"conditions: {name}: wanted one of {', '.join(CONDITION_TYPES)}" for name in unknown]
        if any(not weight >= 0 for weight in self.conditions.values()) or not any(self.conditions.values()):
            problems.append(f"conditions must be weights, at least one above 0, got {self.conditions}")
        return problems


def transformer_class(model: Mapping[str, Any]) -> type[MMDiT]:
    return MMDiT


def vae_factors(config: HunyuanVAEConfig | None = None) -> tuple[int, int]:
    """Frames, and pixels along a side, for each of the latent's."""
    config = config or HunyuanVAEConfig()
    return config.time_compression_ratio, config.spatial_compression_ratio


def vae_channels(config: HunyuanVAEConfig) -> int:
    return config.latent_channels


def vae_statistics(vae: VAE) -> tuple[Tensor, Tensor]:
    """Shift and scale: the transformer's latent is ``(z - shift) * scale``."""
    return torch.tensor(vae.config.shift_factor), torch.tensor(vae.config.scale_factor)


def caption(text: str, recipe: Recipe) -> str:
    """The caption with the frame rate behind it, where the recipe has one."""
    return opensora_v2_training_caption(text, fps=None if recipe.data.fps is None else round(recipe.data.fps))


def latent_channels(config: MMDiTConfig) -> int:
    return config.latent_channels


def tokens(config: MMDiTConfig, latent: Sequence[int]) -> int:
    return latent[0] * (latent[1] // config.patch_size) * (latent[2] // config.patch_size)


def arguments(config: MMDiTConfig, latent: Sequence[int], text: int) -> dict[str, Tensor]:
    count = tokens(config, latent)
    given = {
        "img": torch.zeros(1, count, config.in_channels),
        "img_ids": torch.zeros(count, 3),
        "txt": torch.zeros(1, text, config.context_in_dim),
        "txt_ids": torch.zeros(text, 3),
        "timesteps": torch.zeros(1),
        "y_vec": torch.zeros(1, config.vec_in_dim),
    }
    given |= {"cond": torch.zeros(1, count, config.cond_channels)} if config.cond_embed else {}
    return given | ({"guidance": torch.zeros(1)} if config.guidance_embed else {})


def needs_video(config: MMDiTConfig) -> bool:
    return config.cond_embed


def widths(config: MMDiTConfig, channels: int, text: Features) -> dict[str, tuple[int, int, str]]:
    return {
        "in_channels": (config.in_channels, channels * config.patch_size**2, "a patch of the VAE's latents"),
        "context_in_dim": (config.context_in_dim, text["txt"].shape[-1], "T5's hidden states"),
        "vec_in_dim": (config.vec_in_dim, text["y_vec"].shape[-1], "CLIP's vector"),
    }


def draw_text(task: DiTTask, captions: Sequence[str], generator: torch.Generator) -> Features:
    """Each encoder by itself sees an empty caption instead, so often that both do with the recipe's probability."""
    text, null = task.text(captions), task.text([""])
    ratio = math.sqrt(task.recipe.text.caption_dropout)
    draws = {name: torch.rand(len(captions), generator=generator) for name in text}
    return {name: drop_text(value, null[name], draws[name], ratio) for name, value in text.items()}


def conditions(task: DiTTask, latents: Tensor, batch: dict[str, Any], generator: torch.Generator) -> Features:
    if not task.model.config.cond_embed:
        return {}
    mask, masked = draw_condition(task, latents, batch["video"], generator)
    return {"mask": mask, "masked_latent": masked}


def loss(task: DiTTask, latents: Tensor, text: Features, given: Features, generator: torch.Generator) -> Tensor:
    options: Options = task.options
    config: MMDiTConfig = task.model.config
    arguments, target = training_inputs(
        latents.to(task.dtype),
        text["txt"],
        text["y_vec"],
        normal=torch.randn(len(latents), generator=generator),
        noise=torch.randn(latents.shape, generator=generator),
        patch_size=config.patch_size,
        guidance=options.guidance,
        mask=given.get("mask"),
        masked_latent=given.get("masked_latent"),
    )
    return batch_loss(task.model(**arguments), target, None if options.reference_loss else given.get("mask"))


@torch.no_grad()
def draw_condition(task: DiTTask, latents: Tensor, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mask and masked latent of a kind of condition that is drawn for each sample."""
    rng = random.Random(int(torch.randint(1 << 62, (), generator=generator)))
    kinds = [
        choose_condition(task.options.conditions, latents.shape[2], rng, time_ratio=task.vae.frames_per_latent)
        for _ in range(len(latents))
    ]
    return training_condition(
        video.to(task.device, task.dtype),
        latents.to(task.dtype),
        kinds,
        lambda clip: task.vae.encode(clip, generator=generator),
        time_ratio=task.vae.frames_per_latent,
    )
