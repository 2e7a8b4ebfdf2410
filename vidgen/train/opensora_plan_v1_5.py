# SPDX-License-Identifier: Apache-2.0
"""Training of Open-Sora Plan 1.5: flow matching under T5 and CLIP, on latents of the 8x8x8 WFVAE, which is trained too.

The modules of the systems in this folder have the same names: the classes and their presets, `Options` (the section
``diffusion`` of a recipe), and the functions by which a `vidgen.train.tasks.DiTTask` differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vidgen.diffusion import flow_matching_loss
from vidgen.models import autoencoders
from vidgen.models.autoencoders.wfvae import WFVAE as VAE
from vidgen.models.autoencoders.wfvae_config import WFVAEConfig
from vidgen.models.opensora_plan_v1_5 import PRESETS, SparseUMMDiT, SparseUMMDiTConfig
from vidgen.models.text import clean_caption
from vidgen.pipelines.opensora_plan_v1_5 import encode_text, load_encoders, load_vae, read_vae_config

if TYPE_CHECKING:
    from .features import Features
    from .recipe import Recipe
    from .tasks import DiTTask

__all__ = ["PRESETS", "VAE", "encode_text", "load_encoders", "load_vae", "read_vae_config"]

DROPPED = ("",)  # what stands for a caption that is left out
FACTORS = (8, 8, 8)
VAE_PRESETS = {name: config for name, config in autoencoders.PRESETS.items() if config.vae_scale_factor == FACTORS}


@dataclass
class Options:
    """Noise levels of the flow-matching loss."""

    density: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    shift: float | None = None  # None: the dynamic shift of the resolution

    def validate(self) -> list[str]:
        return [f"shift must be positive, got {self.shift}"] if self.shift is not None and self.shift <= 0 else []


def transformer_class(model: Mapping[str, Any]) -> type[SparseUMMDiT]:
    """The class that is trained, from the section ``model`` of a recipe."""
    return SparseUMMDiT


def vae_factors(config: WFVAEConfig | None = None) -> tuple[int, int]:
    """Frames, and pixels along a side, for each of the latent's: of a VAE's configuration, or of the release."""
    factors = FACTORS if config is None else config.vae_scale_factor
    return factors[0], factors[1]


def vae_channels(config: WFVAEConfig) -> int:
    """Channels of the VAE's latent."""
    return config.latent_dim


def vae_statistics(vae: VAE) -> tuple[Tensor, Tensor]:
    """Shift and scale: the transformer's latent is ``(z - shift) * scale``."""
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config.shift or [0.0]).view(shape), torch.tensor(vae.config.scale or [1.0]).view(shape)


def caption(text: str, recipe: Recipe) -> str:
    """A caption as the encoders are to see it."""
    return clean_caption(text)


def latent_channels(config: SparseUMMDiTConfig) -> int:
    """Channels of the latent that a transformer of this configuration denoises."""
    return config.in_channels


def tokens(config: Any, latent: Sequence[int]) -> int:
    """Video tokens of a latent of these frames, rows and columns."""
    return latent[0] * (latent[1] // config.patch_size) * (latent[2] // config.patch_size)


def arguments(config: SparseUMMDiTConfig, latent: Sequence[int], text: int) -> dict[str, Tensor]:
    """What the transformer is given for one sample of such a latent and so many text tokens; only shapes matter."""
    return {
        "hidden_states": torch.zeros(1, config.in_channels, *latent),
        "timestep": torch.zeros(1),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "encoder_hidden_states": torch.zeros(1, text, config.caption_channels),
    }


def needs_video(config: SparseUMMDiTConfig) -> bool:
    """Whether the conditions are made of pixels."""
    return False


def widths(config: SparseUMMDiTConfig, channels: int, text: Features) -> dict[str, tuple[int, int, str]]:
    """What the transformer's configuration says, what it must say, and where that comes from, by field."""
    hidden, pooled = text["encoder_hidden_states"].shape[-1], text["pooled_projections"].shape[-1]
    return {
        "in_channels": (config.in_channels, channels, "the VAE's latents"),
        "out_channels": (config.out_channels, channels, "the VAE's latents"),
        "caption_channels": (config.caption_channels, hidden, "T5's hidden states"),
        "pooled_projection_dim": (config.pooled_projection_dim, pooled, "CLIP's projection"),
    }


def draw_text(task: DiTTask, captions: Sequence[str], generator: torch.Generator) -> Features:
    """The captions' embeddings; at random, both encoders see an empty caption instead."""
    kept = torch.rand(len(captions), generator=generator) >= task.recipe.text.caption_dropout
    return task.text([text if keep else "" for text, keep in zip(captions, kept.tolist(), strict=True)])


def conditions(task: DiTTask, latents: Tensor, batch: dict[str, Any], generator: torch.Generator) -> Features:
    """What else the transformer is shown, made by the VAE from the pixels of a batch; all draws that it needs."""
    return {}


def loss(task: DiTTask, latents: Tensor, text: Features, given: Features, generator: torch.Generator) -> Tensor:
    """The loss of a batch from what its encoders, `draw_text` and `conditions` have made of it."""
    options: Options = task.options

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return task.model(x.to(task.dtype), timestep, **text)

    return flow_matching_loss(
        velocity,
        latents,
        density=options.density,
        weighting=options.weighting,
        shift=options.shift,
        generator=generator,
    )
