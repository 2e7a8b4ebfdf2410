# SPDX-License-Identifier: Apache-2.0
"""Open-Sora 2.0: an MMDiT under T5 and CLIP, flow sampling guided by text and by given frames, the Hunyuan VAE."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.checkpoints.hf import read_config
from vidgen.diffusion import opensora_v2 as sampling
from vidgen.diffusion.opensora_v2_conditions import (
    CONDITION_TYPES,
    given_frames,
    inference_condition,
    reference_clips,
    restore_references,
)
from vidgen.io import read_json
from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE
from vidgen.models.autoencoders.hunyuan_vae_config import DIFFUSERS_CLASS, HunyuanVAEConfig
from vidgen.models.opensora_v2 import MMDiT, MMDiTConfig
from vidgen.models.text import CLIPTextEncoder, T5TextEncoder, opensora_v2_prompt

from . import adapters
from .folders import Parts, needed
from .parallel import decode_stream
from .references import is_image, read_reference
from .settings import Job, Request, size_problems

DEFAULTS: dict[str, Any] = {
    "steps": 50,
    "guidance": 7.5,
    "image_guidance": 3.0,
    "text_oscillation": True,
    "image_oscillation": True,
    "temporal_oscillation": True,
    "negative_prompt": "",
    "shift": None,  # None: that of the resolution
    "condition": None,  # None: i2v_head or v2v_head where an image or a video is given
    "image_model": None,  # makes the first frame from the prompt
    "tile_frames": 64,
}

SHARED_ARGUMENTS = ("img_ids", "txt_ids")  # of the transformer: without a batch axis

Encoders = tuple[T5TextEncoder, CLIPTextEncoder]


def model_config(parts: Parts) -> MMDiTConfig:
    return read_config(MMDiT, parts.transformer)


def read_vae_config(folder: Path) -> HunyuanVAEConfig:
    """The configuration of a VAE's folder, ours or that of diffusers."""
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and values.get("_class_name") == DIFFUSERS_CLASS:
        return HunyuanVAEConfig.from_diffusers(values)
    return read_config(HunyuanVAE, folder)


def video_factors(config: HunyuanVAEConfig) -> tuple[int, int]:
    """Frames are a multiple of the first number and one more, height and width multiples of the second."""
    return config.time_compression_ratio, config.spatial_compression_ratio


def latent_shape(job: Job) -> list[int]:
    """Frames, height and width of the latent."""
    vae = read_vae_config(needed(job.parts.vae))
    frames = sampling.latent_frames(job.frames, time_ratio=vae.time_compression_ratio)
    return [frames, job.height // vae.spatial_compression_ratio, job.width // vae.spatial_compression_ratio]


def kind(job: Job, request: Request) -> str:
    """Which frames the references of a request give."""
    if job.settings.condition is not None:
        return job.settings.condition
    if not request.references:
        return "i2v_head" if job.settings.image_model is not None else "t2v"
    if len(request.references) > 1:
        return "i2v_loop"
    return "i2v_head" if is_image(request.references[0]) else "v2v_head"


def problems(job: Job, requests: Sequence[Request]) -> list[str]:
    """What cannot be sampled, in words; empty when all is well."""
    vae, config = read_vae_config(needed(job.parts.vae)), model_config(job.parts)
    step, side = video_factors(vae)
    found = size_problems(job, step, config.patch_size * side, side)
    try:
        decoding_config(job, vae)
    except ValueError as error:
        found.append(f"tile_size or tile_frames: {error}")
    chosen = job.settings.condition
    if chosen is not None and chosen not in CONDITION_TYPES:
        return [*found, f"condition must be one of {', '.join(CONDITION_TYPES)}, got {chosen!r}"]
    for request in requests:
        type_ = kind(job, request)
        found += [f"{problem} ({request.prompt!r})" for problem in _reference_problems(job, config, request, type_)]
    return found


def _reference_problems(job: Job, config: MMDiTConfig, request: Request, kind: str) -> list[str]:
    given, made = request.references, job.settings.image_model is not None
    if kind == "t2v":
        return ["condition t2v takes no images and no videos"] if given else []
    if not config.cond_embed:
        return [f"the model has no cond_embed and cannot take {kind}"]
    if made and given:
        return ["an image model makes the reference, none may be given"]
    if made and kind != "i2v_head":
        return [f"an image model makes the first frame, which is i2v_head and not {kind}"]
    most = 2 if kind in ("i2v_loop", "i2v_tail") else 1
    if not made and not 1 <= len(given) <= most:
        return [f"condition {kind} needs {'one or two references' if most > 1 else 'one reference'}, got {len(given)}"]
    if kind.startswith("v2v"):
        if is_image(given[0]):
            return [f"condition {kind} needs a video, got {given[0].name}"]
        frames, least = latent_shape(job)[0], given_frames(kind.removesuffix("_easy"))
        if frames <= least:
            return [f"condition {kind} gives {least} latent frames, the video has {frames}: wanted more frames"]
    return []


def load_encoders(parts: Parts, dtype: torch.dtype, device: torch.device) -> Encoders:
    t5 = T5TextEncoder.from_pretrained(
        needed(parts.t5),
        parts.t5_max_length,
        tokenizer_folder=parts.tokenizer("t5"),
        dtype=dtype,
        mask_padding=False,
    )
    clip = CLIPTextEncoder.from_pretrained(
        needed(parts.clip),
        parts.clip_max_length,
        tokenizer_folder=parts.tokenizer("clip"),
        dtype=dtype,
        projected=False,
    )
    return t5.to(device), clip.to(device)


def encode_text(encoders: Encoders, text: str) -> dict[str, Tensor]:
    """T5's tokens, padding and all, and CLIP's vector, under the sampler's names, ``(1, ...)`` each."""
    t5, clip = encoders
    return {"txt": t5.encode([text])[0], "y_vec": clip.encode([text])}


def texts(job: Job, request: Request) -> tuple[str, str]:
    """The positive and the negative text of a request, as the encoders are to see them."""
    prompt = job.parts.prompt_prefix + request.prompt
    return opensora_v2_prompt(prompt, fps=round(job.fps), motion_score=job.parts.motion_score), job.negative(request)


def load_vae(parts: Parts, dtype: torch.dtype, device: torch.device) -> HunyuanVAE:
    return HunyuanVAE.from_pretrained(needed(parts.vae), dtype=dtype, device=device)


def transformer_class(parts: Parts) -> type[MMDiT]:
    return MMDiT


def load_transformer(parts: Parts, dtype: torch.dtype, device: torch.device) -> MMDiT:
    return adapters.load_transformer(MMDiT, parts, dtype, device)


def conditioned(job: Job, request: Request) -> bool:
    """Whether the request has conditions that the VAE must encode."""
    return kind(job, request) != "t2v"


def conditions(vae: HunyuanVAE, job: Job, request: Request, seed: int) -> dict[str, Tensor]:
    """Mask ``(1, 1, frames, height, width)`` and masked latent ``(1, channels, ...)`` of what is given.

    Latents are samples of the posterior, drawn from a generator of its own with the request's seed.
    """
    type_ = kind(job, request)
    videos = [_read(path, job, type_) for path in request.references]
    generator = torch.Generator().manual_seed(seed)
    clips = [
        vae.encode(clip[None].to(job.device, job.dtype), generator=generator)[0]
        for clip in reference_clips(videos, type_, time_ratio=vae.frames_per_latent)
    ]
    like = torch.empty(1, vae.config.latent_channels, *latent_shape(job), dtype=job.dtype, device=job.device)
    mask, masked = inference_condition(like, type_, [clips])
    return {"mask": mask, "masked_latent": masked}


def _read(path: Path, job: Job, kind: str) -> Tensor:
    return read_reference(path, job.height, job.width, fps=None if kind.startswith("i2v") else job.fps)


def predictions(job: Job, kind: str) -> int:
    """How many predictions of the transformer a step of one video needs at once."""
    if model_config(job.parts).guidance_embed:
        return 1
    return 2 if kind == "t2v" else 3


def sample_latents(
    transformer: MMDiT,
    job: Job,
    kind: str,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    given: dict[str, Tensor],
    seeds: Sequence[int],
) -> Tensor:
    """Latents ``(batch, channels, frames, height, width)`` of a batch of texts and conditions.

    The noise is drawn on the CPU, for each video from a generator of its own.
    """
    settings, config, shape = job.settings, transformer.config, latent_shape(job)
    shape_1 = (1, config.latent_channels, *shape)
    noise = torch.cat([torch.randn(shape_1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = noise.to(job.device, job.dtype)
    tokens = (shape[1] // config.patch_size) * (shape[2] // config.patch_size)
    levels = sampling.schedule(needed(settings.steps), tokens, shape[0], flow_shift=settings.shift)
    if config.guidance_embed:
        return sampling.sample_distilled(
            transformer, noise, levels, positive, guidance=needed(settings.guidance), patch_size=config.patch_size
        )
    if config.cond_embed and not given:
        given = {"mask": torch.zeros_like(noise[:, :1]), "masked_latent": torch.zeros_like(noise)}
    latents = sampling.sample_guided(
        transformer,
        noise,
        levels,
        positive,
        negative,
        mask=given.get("mask"),
        masked_latent=given.get("masked_latent"),
        guidance=needed(settings.guidance),
        guidance_img=needed(settings.image_guidance),
        text_osci=needed(settings.text_oscillation),
        image_osci=needed(settings.image_oscillation),
        scale_temporal_osci=needed(settings.temporal_oscillation) and kind.startswith("i2v"),
        patch_size=config.patch_size,
    )
    return restore_references(latents, given["mask"], given["masked_latent"], kind) if given else latents


def decode(vae: HunyuanVAE, job: Job, latent: Tensor, group: dist.ProcessGroup | None = None) -> Iterator[Tensor]:
    """The video of one latent ``(1, ...)``, in chunks ``(1, 3, frames, height, width)``: tiles of time.

    With a group its ranks decode together, and the video is on the first of them.
    """
    vae.config = decoding_config(job, vae.config)
    return decode_stream(vae, latent, group)


def decoding_config(job: Job, config: HunyuanVAEConfig) -> HunyuanVAEConfig:
    """The VAE's configuration with the job's tiles. Raises ValueError for tiles that do not line up."""
    changes: dict[str, Any] = {}
    if job.settings.tile_frames:
        changes |= {"use_temporal_tiling": True, "sample_tsize": job.settings.tile_frames}
    if job.settings.tile_size is not None:
        changes |= {"use_spatial_tiling": True, "sample_size": job.settings.tile_size}
    return dataclasses.replace(config, **changes)
