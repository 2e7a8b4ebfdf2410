# SPDX-License-Identifier: Apache-2.0
"""Open-Sora Plan 1.5: a SparseUMMDiT under T5 and CLIP, flow matching with Euler steps, the 8x8x8 WFVAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.checkpoints.hf import read_config
from vidgen.diffusion import sample, shifted_linear_schedule
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT
from vidgen.models.text import CLIPTextEncoder, T5TextEncoder, clean_caption

from . import adapters
from .folders import Parts, needed
from .settings import Job, Request, size_problems
from .wfvae import decode as decode
from .wfvae import latent_shape as latent_shape
from .wfvae import load_vae as load_vae
from .wfvae import read_vae_config as read_vae_config
from .wfvae import video_factors as video_factors

DEFAULTS = {"steps": 50, "guidance": 8.0, "guidance_rescale": 0.7, "shift": 7.0, "negative_prompt": ""}

Encoders = tuple[T5TextEncoder, CLIPTextEncoder]


def kind(job: Job, request: Request) -> str:
    return "t2v"


def problems(job: Job, requests: Sequence[Request]) -> list[str]:
    """What cannot be sampled, in words; empty when all is well."""
    factor, side = video_factors(read_vae_config(needed(job.parts.vae)))
    patch = read_config(SparseUMMDiT, job.parts.transformer).patch_size
    found = size_problems(job, factor, side * patch, side)
    if any(request.references for request in requests):
        found.append("opensora_plan_v1_5 takes no images and no videos")
    return found


def load_encoders(parts: Parts, dtype: torch.dtype, device: torch.device) -> Encoders:
    t5 = T5TextEncoder.from_pretrained(
        needed(parts.t5), parts.t5_max_length, tokenizer_folder=parts.tokenizer("t5"), dtype=dtype
    )
    clip = CLIPTextEncoder.from_pretrained(
        needed(parts.clip), parts.clip_max_length, tokenizer_folder=parts.tokenizer("clip"), dtype=dtype
    )
    return t5.to(device), clip.to(device)


def encode_text(encoders: Encoders, text: str) -> dict[str, Tensor]:
    """Both encoders' views of one text, under the transformer's argument names, ``(1, ...)`` each."""
    t5, clip = encoders
    text = clean_caption(text)
    hidden, mask = t5.encode([text])
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "pooled_projections": clip.encode([text])}


def texts(job: Job, request: Request) -> tuple[str, str]:
    """The positive and the negative text of a request, as the encoders are to see them."""
    return job.parts.prompt_prefix + request.prompt, job.negative(request)


def transformer_class(parts: Parts) -> type[SparseUMMDiT]:
    return SparseUMMDiT


def load_transformer(parts: Parts, dtype: torch.dtype, device: torch.device) -> SparseUMMDiT:
    return adapters.load_transformer(SparseUMMDiT, parts, dtype, device)


def conditioned(job: Job, request: Request) -> bool:
    """Whether the request has conditions that the VAE must encode."""
    return False


def predictions(job: Job, kind: str) -> int:
    """How many predictions of the transformer a step of one video needs at once."""
    return 2 if needed(job.settings.guidance) > 1 else 1


def sample_latents(
    transformer: SparseUMMDiT,
    job: Job,
    kind: str,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    given: dict[str, Tensor],
    seeds: Sequence[int],
) -> Tensor:
    """Latents ``(batch, channels, frames, height, width)`` of a batch of texts.

    The noise is drawn on the CPU, for each video from a generator of its own.
    """
    shape = (1, transformer.config.in_channels, *latent_shape(job))
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    settings = job.settings
    return sample(
        transformer,
        noise.to(job.device, job.dtype),
        shifted_linear_schedule(needed(settings.steps), needed(settings.shift)),
        positive,
        negative_conditioning=negative,
        guidance_scale=needed(settings.guidance),
        guidance_rescale=needed(settings.guidance_rescale),
    )
