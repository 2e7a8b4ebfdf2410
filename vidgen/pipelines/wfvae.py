# SPDX-License-Identifier: Apache-2.0
"""What the pipelines of Open-Sora Plan 1.3 and 1.5 have in common: the WFVAE, whatever its factors are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.checkpoints.hf import read_config
from vidgen.models.autoencoders.wfvae import WFVAE
from vidgen.models.autoencoders.wfvae_config import WFVAEConfig

from .folders import Parts, needed
from .parallel import decode_stream
from .settings import Job, chunk_latents


def read_vae_config(folder: Path) -> WFVAEConfig:
    """The configuration of a VAE's folder."""
    return read_config(WFVAE, folder)


def video_factors(config: WFVAEConfig) -> tuple[int, int]:
    """Frames are a multiple of the first number and one more, height and width multiples of the second."""
    factor, side, _ = config.vae_scale_factor
    return factor, side


def latent_shape(job: Job) -> list[int]:
    """Frames, height and width of the latent."""
    factor, side = video_factors(read_vae_config(needed(job.parts.vae)))
    return [(job.frames - 1) // factor + 1, job.height // side, job.width // side]


def load_vae(parts: Parts, dtype: torch.dtype, device: torch.device) -> WFVAE:
    return WFVAE.from_pretrained(needed(parts.vae), dtype=dtype, device=device)


def decode(vae: WFVAE, job: Job, latent: Tensor, group: dist.ProcessGroup | None = None) -> Iterator[Tensor]:
    """The video of one latent ``(1, ...)``, in chunks ``(1, 3, frames, height, width)``.

    With a group its ranks decode together, and the video is on the first of them.
    """
    chunk = chunk_latents(job, vae.frames_per_latent)
    return decode_stream(vae, latent, group, chunk_latents=chunk, tile_size=job.settings.tile_size)
