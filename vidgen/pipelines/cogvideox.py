# SPDX-License-Identifier: Apache-2.0
"""CogVideoX 1.0 and 1.5: v-prediction under T5, by DDIM or the second-order SDE solver, for text and image to video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.checkpoints.hf import read_config
from vidgen.diffusion import (
    cogvideox_alphas_cumprod,
    diffusers_steps,
    draw_noise,
    image_latents,
    latent_frames,
    sample_discrete,
)
from vidgen.io import read_json
from vidgen.models.autoencoders.causal import sample_latent, split_moments
from vidgen.models.autoencoders.cogvideox_vae import AutoencoderKLCogVideoX
from vidgen.models.autoencoders.cogvideox_vae_config import CogVideoXVAEConfig
from vidgen.models.cogvideox import CogVideoXConfig, CogVideoXTransformer3DModel
from vidgen.models.text import T5TextEncoder

from . import adapters
from .folders import Parts, needed
from .parallel import decode_stream
from .references import is_image, read_reference
from .settings import Job, Request, size_problems

DEFAULTS: dict[str, Any] = {
    "steps": 50,
    "guidance": 6.0,
    "negative_prompt": "",
    "zero_negative": False,
    "shift": None,  # of the signal-to-noise ratio; None: that of the folder's scheduler, or 3 for 2B and 1 for others
    "sampler": None,  # None: ddim for 2B, dpm for the others
    "dynamic_guidance": None,  # None: with dpm
}
SAMPLERS = ("ddim", "dpm")


def model_config(parts: Parts) -> CogVideoXConfig:
    return read_config(CogVideoXTransformer3DModel, parts.transformer)


def read_vae_config(folder: Path) -> CogVideoXVAEConfig:
    """The configuration of a VAE's folder."""
    return read_config(AutoencoderKLCogVideoX, folder)


def is_image_model(config: CogVideoXConfig) -> bool:
    """Whether the transformer sees an image's latent beside the noisy one."""
    return config.in_channels == 2 * config.out_channels


def video_factors(config: CogVideoXVAEConfig) -> tuple[int, int]:
    """Frames are a multiple of the first number and one more, height and width multiples of the second."""
    # The decoder takes latent frames in pairs behind the first one, so that the video has a still at its beginning.
    return 2 * config.temporal_compression_ratio, config.pixels_per_latent


def latent_shape(job: Job) -> list[int]:
    """Frames, height and width of the latent that is sampled."""
    side = read_vae_config(needed(job.parts.vae)).pixels_per_latent
    return [_latent_frames(job)[0], job.height // side, job.width // side]


def kind(job: Job, request: Request) -> str:
    return "i2v" if request.references else "t2v"


def problems(job: Job, requests: Sequence[Request]) -> list[str]:
    """What cannot be sampled, in words; empty when all is well."""
    config, vae = model_config(job.parts), read_vae_config(needed(job.parts.vae))
    step, side = video_factors(vae)
    found = size_problems(job, step, config.patch_size * side, side)
    if job.settings.sampler not in (None, *SAMPLERS):
        found.append(f"sampler must be one of {', '.join(SAMPLERS)}, got {job.settings.sampler!r}")
    if config.use_learned_positional_embeddings and not found:
        trained, grid = config.table_grid, latent_shape(job)
        size = [trained[1] * config.patch_size, trained[2] * config.patch_size]
        if grid[1:] != size or grid[0] > trained[0]:
            side, factor = vae.pixels_per_latent, vae.temporal_compression_ratio
            wanted = f"{size[0] * side} x {size[1] * side} and up to {factor * (trained[0] - 1) + 1} frames"
            got = f"{job.height} x {job.width} and {job.frames}"
            found.append(f"this model's positions are learned: wanted {wanted}, got {got}")
    for request in requests:
        if is_image_model(config) and (len(request.references) != 1 or not is_image(request.references[0])):
            found.append(f"an image-to-video model needs one image for {request.prompt!r}")
        if not is_image_model(config) and request.references:
            found.append(f"a text-to-video model takes no images and no videos, got some for {request.prompt!r}")
    return found


def load_encoders(parts: Parts, dtype: torch.dtype, device: torch.device) -> T5TextEncoder:
    return T5TextEncoder.from_pretrained(
        needed(parts.t5),
        parts.t5_max_length,
        tokenizer_folder=parts.tokenizer("t5"),
        dtype=dtype,
        mask_padding=False,
    ).to(device)


def encode_text(encoder: T5TextEncoder, text: str) -> dict[str, Tensor]:
    """Tokens ``(1, tokens, channels)``, padding and all, which the transformer attends to."""
    return {"encoder_hidden_states": encoder.encode([text])[0]}


def texts(job: Job, request: Request) -> tuple[str, str]:
    """The positive and the negative text of a request, as the encoders are to see them."""
    return job.parts.prompt_prefix + request.prompt, job.negative(request)


def load_vae(parts: Parts, dtype: torch.dtype, device: torch.device) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(needed(parts.vae), dtype=dtype, device=device)


def transformer_class(parts: Parts) -> type[CogVideoXTransformer3DModel]:
    return CogVideoXTransformer3DModel


def load_transformer(parts: Parts, dtype: torch.dtype, device: torch.device) -> CogVideoXTransformer3DModel:
    return adapters.load_transformer(CogVideoXTransformer3DModel, parts, dtype, device)


def conditioned(job: Job, request: Request) -> bool:
    """Whether the request has conditions that the VAE must encode."""
    return bool(request.references)


def conditions(vae: AutoencoderKLCogVideoX, job: Job, request: Request, seed: int) -> dict[str, Tensor]:
    """The image's latent in the first frame and zeros in the others, ``(1, channels, frames, height, width)``.

    The latent is a sample of the posterior, whose noise is the first that the request's seed gives.
    """
    image = read_reference(request.references[0], job.height, job.width)[None].to(job.device, job.dtype)
    mean, logvar = split_moments(vae.encode_moments(image))
    generator = torch.Generator().manual_seed(seed)
    latent = vae.normalize_image(sample_latent(mean, logvar, None, generator))
    patch = model_config(job.parts).patch_size_t
    return {"image": image_latents(latent, _latent_frames(job)[0], patch_size_t=patch)}


def predictions(job: Job, kind: str) -> int:
    """How many predictions of the transformer a step of one video needs at once."""
    return 2 if needed(job.settings.guidance) > 1 else 1


def sample_latents(
    transformer: CogVideoXTransformer3DModel,
    job: Job,
    kind: str,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    given: dict[str, Tensor],
    seeds: Sequence[int],
) -> Tensor:
    """Latents ``(batch, channels, frames, height, width)`` without the frames that only fill patches.

    Noise, that of the SDE solver too, is drawn on the CPU, for each video from a generator of its own.
    """
    settings, config = job.settings, transformer.config
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, config.out_channels, *latent_shape(job))
    if "image" in given:  # the posterior of the image has had the first draws of each seed, as in diffusers
        for generator in generators:
            torch.randn((*shape[:2], 1, *shape[3:]), generator=generator, dtype=job.dtype)

    def draw() -> Tensor:
        return torch.cat([draw_noise(shape, generator=generator) for generator in generators]).to(job.device)

    def velocity(x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, image: Tensor | None = None) -> Tensor:
        x = x if image is None else torch.cat([x, image.to(x)], 1)
        return transformer(x.to(job.dtype), timestep, encoder_hidden_states)

    if settings.zero_negative:
        negative = {name: torch.zeros_like(value) for name, value in negative.items()}
    sampler = settings.sampler or ("dpm" if config.use_rotary_positional_embeddings else "ddim")
    dynamic = sampler == "dpm" if settings.dynamic_guidance is None else settings.dynamic_guidance
    shift = snr_shift(job.parts, config) if settings.shift is None else settings.shift
    latents = sample_discrete(
        velocity,
        draw(),
        diffusers_steps(needed(settings.steps), cogvideox_alphas_cumprod(shift)),
        {**positive, **given},
        negative_conditioning={**negative, **given},
        solver=sampler,
        guidance_scale=needed(settings.guidance),
        dynamic_guidance=dynamic,
        draw=draw,
    )
    return latents[:, :, _latent_frames(job)[1] :].to(job.dtype)


def decode(
    vae: AutoencoderKLCogVideoX, job: Job, latent: Tensor, group: dist.ProcessGroup | None = None
) -> Iterator[Tensor]:
    """The video of one latent ``(1, ...)``, in chunks ``(1, 3, frames, height, width)``.

    With a group its ranks decode together, and the video is on the first of them.
    """
    return decode_stream(vae, latent, group, tile_size=job.settings.tile_size)


def snr_shift(parts: Parts, config: CogVideoXConfig) -> float:
    """By how much the signal-to-noise ratio of the schedule is divided."""
    file = parts.transformer.parent / "scheduler" / "scheduler_config.json"
    if file.is_file():
        return float(read_json(file).get("snr_shift_scale", 3.0))  # what diffusers' schedulers take it for if absent
    return 1.0 if config.use_rotary_positional_embeddings else 3.0


def _latent_frames(job: Job) -> tuple[int, int]:
    """Latent frames to sample, and how many of them, at the beginning, only fill patches."""
    factor, patch = (
        read_vae_config(needed(job.parts.vae)).temporal_compression_ratio,
        model_config(job.parts).patch_size_t,
    )
    return latent_frames(job.frames, frames_per_latent=factor, patch_size_t=patch)
