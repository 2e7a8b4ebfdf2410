# SPDX-License-Identifier: Apache-2.0
"""Training of Open-Sora Plan 1.5: flow matching under T5 and CLIP, on latents of the 8x8x8 WFVAE, which is trained too.

The modules of the systems in this folder have the same names: the classes and their presets, `Options` (the section
``diffusion`` of a recipe), and the functions by which a `vidgen.train.tasks.DiTTask` differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vidgen.diffusion import flow_matching_loss
from vidgen.models.autoencoders import PRESETS as VAE_PRESETS
from vidgen.models.autoencoders import WFVAE as VAE
from vidgen.models.opensora_plan_v1_5 import PRESETS
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT as TRANSFORMER
from vidgen.models.text import clean_caption
from vidgen.pipelines.opensora_plan_v1_5 import encode_text, load_encoders, load_vae

if TYPE_CHECKING:
    from .features import Features
    from .tasks import DiTTask

__all__ = [
    "PRESETS",
    "TRANSFORMER",
    "VAE",
    "VAE_PRESETS",
    "Options",
    "caption",
    "draw_text",
    "encode_text",
    "latent_channels",
    "load_encoders",
    "load_vae",
    "loss",
    "needs_video",
    "tokens",
    "widths",
]


@dataclass
class Options:
    """Noise levels of the flow-matching loss."""

    density: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    shift: float | None = None  # None: the dynamic shift of the resolution

    def validate(self) -> list[str]:
        return [f"shift must be positive, got {self.shift}"] if self.shift is not None and self.shift <= 0 else []


def caption(text: str) -> str:
    """A caption as the encoders are to see it."""
    return clean_caption(text)


def latent_channels(config: Any) -> int:
    """Channels of the latent that a transformer of this configuration denoises."""
    return config.in_channels


def tokens(config: Any, latent: Sequence[int]) -> int:
    """Video tokens of a latent of these frames, rows and columns."""
    return latent[0] * (latent[1] // config.patch_size) * (latent[2] // config.patch_size)


def needs_video(config: Any) -> bool:
    """Whether the conditions are made of pixels."""
    return False


def widths(config: Any, latent_channels: int, text: Features) -> dict[str, tuple[int, int, str]]:
    """What the transformer's configuration says, what it must say, and where that comes from, by field."""
    hidden, pooled = text["encoder_hidden_states"].shape[-1], text["pooled_projections"].shape[-1]
    return {
        "in_channels": (config.in_channels, latent_channels, "the VAE's latents"),
        "out_channels": (config.out_channels, latent_channels, "the VAE's latents"),
        "caption_channels": (config.caption_channels, hidden, "T5's hidden states"),
        "pooled_projection_dim": (config.pooled_projection_dim, pooled, "CLIP's projection"),
    }


def draw_text(task: DiTTask, captions: Sequence[str], generator: torch.Generator) -> Features:
    """The captions' embeddings; at random, both encoders see an empty caption instead."""
    kept = torch.rand(len(captions), generator=generator) >= task.recipe.text.caption_dropout
    return task.text([caption if keep else "" for caption, keep in zip(captions, kept.tolist(), strict=True)])


def loss(task: DiTTask, latents: Tensor, text: Features, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
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
