# SPDX-License-Identifier: Apache-2.0
"""Training of CogVideoX 1.0 and 1.5: velocities under T5, for text to video and, with more input channels, from images.

The names are those of `vidgen.train.opensora_plan_v1_5`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vidgen.diffusion import (
    cogvideox_alphas_cumprod,
    cogvideox_loss,
    image_latents,
    noise_image,
    pad_training_latents,
)
from vidgen.models.autoencoders.cogvideox_vae import AutoencoderKLCogVideoX as VAE
from vidgen.models.autoencoders.cogvideox_vae_config import CogVideoXVAEConfig
from vidgen.models.cogvideox import PRESETS, CogVideoXConfig, CogVideoXTransformer3DModel
from vidgen.pipelines.cogvideox import encode_text, is_image_model, load_encoders, load_vae, read_vae_config

if TYPE_CHECKING:
    from .features import Features
    from .recipe import Recipe
    from .tasks import DiTTask

__all__ = ["PRESETS", "VAE", "encode_text", "load_encoders", "load_vae", "read_vae_config"]

DROPPED = ("",)  # what stands for a caption that is left out
VAE_PRESETS: dict[str, Any] = {}  # it is not trained here


@dataclass
class Options:
    """The loss, and how often the text and the image are left out."""

    kind: Literal["l2", "l1"] = "l2"
    min_snr_value: float | None = None
    offset_noise: float = 0.0
    snr_shift: float | None = None  # None: 3 for 2B, 1 for the others
    dropped_text: Literal["empty", "zeros"] = "empty"  # what stands for a dropped caption; SAT puts zeros
    image_dropout: float = 0.05
    image_noise: bool = True

    def validate(self) -> list[str]:
        problems = [f"offset_noise must not be negative, got {self.offset_noise}"] if self.offset_noise < 0 else []
        for name in ("min_snr_value", "snr_shift"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"{name} must be positive, got {value}")
        if not 0 <= self.image_dropout <= 1:
            problems.append(f"image_dropout must lie in [0, 1], got {self.image_dropout}")
        return problems


def transformer_class(model: Mapping[str, Any]) -> type[CogVideoXTransformer3DModel]:
    return CogVideoXTransformer3DModel


def vae_factors(config: CogVideoXVAEConfig | None = None) -> tuple[int, int]:
    """Frames, and pixels along a side, for each of the latent's."""
    config = config or CogVideoXVAEConfig()
    return config.temporal_compression_ratio, config.pixels_per_latent


def vae_channels(config: CogVideoXVAEConfig) -> int:
    return config.latent_channels


def vae_statistics(vae: VAE) -> tuple[Tensor, Tensor]:
    """Shift and scale: the transformer's latent is ``(z - shift) * scale``."""
    return torch.zeros(()), torch.tensor(vae.config.scaling_factor)


def caption(text: str, recipe: Recipe) -> str:
    return text


def latent_channels(config: CogVideoXConfig) -> int:
    return config.out_channels


def tokens(config: CogVideoXConfig, latent: Sequence[int]) -> int:
    frames, rows, columns = config.patch
    return -(-latent[0] // frames) * (latent[1] // rows) * (latent[2] // columns)


def arguments(config: CogVideoXConfig, latent: Sequence[int], text: int) -> dict[str, Tensor]:
    frames = -(-latent[0] // config.patch[0]) * config.patch[0]  # latents are padded to whole patches
    return {
        "hidden_states": torch.zeros(1, config.in_channels, frames, *latent[1:]),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, text, config.text_embed_dim),
    }


def needs_video(config: CogVideoXConfig) -> bool:
    return is_image_model(config)


def widths(config: CogVideoXConfig, channels: int, text: Features) -> dict[str, tuple[int, int, str]]:
    count, hidden = text["encoder_hidden_states"].shape
    found = {
        "in_channels": (config.in_channels, channels * (1 + is_image_model(config)), "the VAE's latents"),
        "out_channels": (config.out_channels, channels, "the VAE's latents"),
        "text_embed_dim": (config.text_embed_dim, hidden, "T5's hidden states"),
    }
    if config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings:
        found["max_text_seq_length"] = (config.max_text_seq_length, count, "text.t5_max_length")
    return found


def draw_text(task: DiTTask, captions: Sequence[str], generator: torch.Generator) -> Features:
    kept = torch.rand(len(captions), generator=generator) >= task.recipe.text.caption_dropout
    if task.options.dropped_text == "zeros":
        text = task.text(captions)
        return {name: value * kept.view(-1, 1, 1).to(value) for name, value in text.items()}
    return task.text([text if keep else "" for text, keep in zip(captions, kept.tolist(), strict=True)])


def conditions(task: DiTTask, latents: Tensor, batch: dict[str, Any], generator: torch.Generator) -> Features:
    config: CogVideoXConfig = task.model.config
    if not is_image_model(config):
        return {}
    latents = pad_training_latents(latents, config.patch_size_t)
    return {"image": image_condition(task, latents, batch["video"], generator)}


def loss(task: DiTTask, latents: Tensor, text: Features, given: Features, generator: torch.Generator) -> Tensor:
    options: Options = task.options
    config: CogVideoXConfig = task.model.config
    latents = pad_training_latents(latents, config.patch_size_t)
    shift = options.snr_shift or (1.0 if config.use_rotary_positional_embeddings else 3.0)

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        x = torch.cat([x, given["image"].to(x)], 1) if given else x
        return task.model(x.to(task.dtype), timestep, **text)

    return cogvideox_loss(
        velocity,
        latents,
        alphas_cumprod=cogvideox_alphas_cumprod(shift),
        kind=options.kind,
        min_snr_value=options.min_snr_value,
        offset_noise_level=options.offset_noise,
        generator=generator,
    )


@torch.no_grad()
def image_condition(task: DiTTask, latents: Tensor, video: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of the videos' first frames, with a little noise on the pixels; now and then zeros, for a whole batch."""
    image = video[:, :, :1]
    image = noise_image(image, generator=generator) if task.options.image_noise else image
    dropped = float(torch.rand((), generator=generator)) < task.options.image_dropout
    encoded = task.vae.encode(image.to(task.device, task.dtype), generator=generator)
    given = image_latents(encoded, latents.shape[2], patch_size_t=task.model.config.patch_size_t)
    return torch.zeros_like(given) if dropped else given
