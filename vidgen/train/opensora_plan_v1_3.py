# SPDX-License-Identifier: Apache-2.0
"""Training of Open-Sora Plan 1.3: velocities under mT5, from text alone or with frames given; WFVAE 4x8x8, trained too.

The names are those of `vidgen.train.opensora_plan_v1_5`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vidgen.diffusion.inpaint import (
    MASK_TYPES,
    VIDEO_MASK_RATIOS,
    add_condition_noise,
    compress_mask,
    condition_noise_levels,
    draw_mask_type,
    frame_mask,
    hide_generated,
)
from vidgen.diffusion.v_prediction import open_sora_plan_alphas_cumprod, v_prediction_loss
from vidgen.io import read_json
from vidgen.models import autoencoders
from vidgen.models.autoencoders.wfvae import WFVAE as VAE
from vidgen.models.autoencoders.wfvae_config import WFVAEConfig
from vidgen.models.opensora_plan_v1_3 import (
    PRESETS,
    OpenSoraConfig,
    OpenSoraInpaint_v1_3,
    OpenSoraInpaintConfig,
    OpenSoraT2V_v1_3,
)
from vidgen.models.text import drop_caption, opensora_plan_v1_3_training_caption
from vidgen.models.text.captions import OPENSORA_PLAN_V1_3_NEUTRAL_CAPTION
from vidgen.pipelines.folders import weights_folder
from vidgen.pipelines.opensora_plan_v1_3 import encode_text, load_encoders, load_vae, read_vae_config

from .opensora_plan_v1_5 import tokens, vae_channels, vae_statistics

if TYPE_CHECKING:
    from .features import Features
    from .recipe import Recipe
    from .tasks import DiTTask

__all__ = [
    "PRESETS",
    "VAE",
    "encode_text",
    "load_encoders",
    "load_vae",
    "read_vae_config",
    "tokens",
    "vae_channels",
    "vae_statistics",
]

FACTORS = (4, 8, 8)
DROPPED = ("", OPENSORA_PLAN_V1_3_NEUTRAL_CAPTION)  # what stands for a caption that is left out
VAE_PRESETS = {name: config for name, config in autoencoders.PRESETS.items() if config.vae_scale_factor == FACTORS}


@dataclass
class Options:
    """The loss, and how often which frames are given, relative to each other."""

    snr_gamma: float | None = None  # the release: 5 for text to video, none for inpainting
    noise_offset: float = 0.0
    schedule: Literal["linear", "scaled_linear"] = "linear"
    mask_ratios: dict[str, float] = field(default_factory=lambda: {k: float(v) for k, v in VIDEO_MASK_RATIOS.items()})
    min_clear_ratio: float = 0.0
    max_clear_ratio: float = 1.0
    condition_noise: bool = True

    def validate(self) -> list[str]:
        unknown = [name for name in self.mask_ratios if name not in MASK_TYPES]
        problems = [f"mask_ratios: {name}: wanted one of {', '.join(MASK_TYPES)}" for name in unknown]
        if any(not ratio >= 0 for ratio in self.mask_ratios.values()) or not self.mask_ratios:
            problems.append(f"mask_ratios must not be negative, got {self.mask_ratios}")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            problems.append(f"snr_gamma must be positive, got {self.snr_gamma}")
        if not self.noise_offset >= 0:
            problems.append(f"noise_offset must not be negative, got {self.noise_offset}")
        if not 0 <= self.min_clear_ratio <= self.max_clear_ratio <= 1:
            ratios = f"{self.min_clear_ratio} and {self.max_clear_ratio}"
            problems.append(f"ratios must be 0 <= min_clear_ratio <= max_clear_ratio <= 1, got {ratios}")
        return problems


def transformer_class(model: Mapping[str, Any]) -> type[OpenSoraT2V_v1_3]:
    """The inpainting model where the preset, the pretrained folder or a field that only it has says so."""
    if "pretrained" in model:
        name = read_json(weights_folder(model["pretrained"]) / "config.json").get("_class_name")
        return OpenSoraInpaint_v1_3 if name == OpenSoraInpaint_v1_3.__name__ else OpenSoraT2V_v1_3
    inpaint = isinstance(PRESETS.get(model.get("preset", "")), OpenSoraInpaintConfig) or "vae_scale_factor_t" in model
    return OpenSoraInpaint_v1_3 if inpaint else OpenSoraT2V_v1_3


def vae_factors(config: WFVAEConfig | None = None) -> tuple[int, int]:
    """Frames, and pixels along a side, for each of the latent's."""
    factors = FACTORS if config is None else config.vae_scale_factor
    return factors[0], factors[1]


def caption(text: str, recipe: Recipe) -> str:
    return opensora_plan_v1_3_training_caption(text)


def latent_channels(config: OpenSoraConfig) -> int:
    return config.in_channels


def arguments(config: OpenSoraConfig, latent: Sequence[int], text: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.zeros(1, config.input_channels, *latent),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, text, config.caption_channels),
    }


def needs_video(config: OpenSoraConfig) -> bool:
    return isinstance(config, OpenSoraInpaintConfig)


def widths(config: OpenSoraConfig, channels: int, text: Features) -> dict[str, tuple[Any, int, str]]:
    return {
        "in_channels": (config.in_channels, channels, "the VAE's latents"),
        "out_channels": (config.out_channels, channels, "the VAE's latents"),
        "caption_channels": (config.caption_channels, text["encoder_hidden_states"].shape[-1], "mT5's hidden states"),
    }


def draw_text(task: DiTTask, captions: Sequence[str], generator: torch.Generator) -> Features:
    """The captions' embeddings; at random, the encoder sees an empty caption or one that says nothing instead."""
    rate, inpaint = task.recipe.text.caption_dropout, needs_video(task.model.config)
    return task.text([drop_caption(t, probability=rate, inpaint=inpaint, generator=generator) for t in captions])


def conditions(task: DiTTask, latents: Tensor, batch: dict[str, Any], generator: torch.Generator) -> Features:
    return {"given": draw_given(task, batch["video"], generator)} if needs_video(task.model.config) else {}


def loss(task: DiTTask, latents: Tensor, text: Features, given: Features, generator: torch.Generator) -> Tensor:
    options: Options = task.options

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        x = torch.cat([x, given["given"].to(x)], 1) if given else x
        return task.model(x.to(task.dtype), timestep, **text)

    return v_prediction_loss(
        velocity,
        latents,
        alphas_cumprod=open_sora_plan_alphas_cumprod(options.schedule),
        snr_gamma=options.snr_gamma,
        noise_offset=options.noise_offset,
        generator=generator,
    )


@torch.no_grad()
def draw_given(task: DiTTask, video: Tensor, generator: torch.Generator) -> Tensor:
    """Latent of the frames that are given to each sample, and the compressed mask."""
    options: Options = task.options
    batch, _, frames, height, width = video.shape
    ratios = {"min_clear_ratio": options.min_clear_ratio, "max_clear_ratio": options.max_clear_ratio}
    masks = [
        frame_mask(draw_mask_type(options.mask_ratios, generator), frames, **ratios, generator=generator)
        for _ in range(batch)
    ]
    mask = torch.stack(masks).view(batch, 1, frames, 1, 1)
    shown = hide_generated(video, mask)
    if options.condition_noise:
        levels = condition_noise_levels(batch, generator=generator)
        shown = add_condition_noise(shown, mask, levels, torch.randn(shown.shape, generator=generator))
    latent = task.vae.encode(shown.to(task.device, task.dtype), generator=generator)
    sizes = {"frames_per_latent": task.vae.frames_per_latent, "pixels_per_latent": task.vae.pixels_per_latent}
    small = compress_mask(mask.expand(-1, -1, -1, height, width), **sizes)
    return torch.cat([latent, small.to(latent)], 1)
