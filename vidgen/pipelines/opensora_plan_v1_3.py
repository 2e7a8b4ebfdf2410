# SPDX-License-Identifier: Apache-2.0
"""Open-Sora Plan 1.3: v-prediction under mT5 by ancestral Euler steps, with or without given frames; WFVAE 4x8x8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidgen.checkpoints.hf import read_config
from vidgen.diffusion.euler_ancestral import euler_ancestral_schedule, sample_euler_ancestral
from vidgen.diffusion.inpaint import (
    BLACK,
    MASK_TYPES,
    add_condition_noise,
    compress_mask,
    condition_noise_levels,
    frame_mask,
    hide_generated,
    place_frames,
)
from vidgen.io import read_json
from vidgen.models.autoencoders.wfvae import WFVAE
from vidgen.models.opensora_plan_v1_3 import OpenSoraConfig, OpenSoraInpaint_v1_3, OpenSoraT2V_v1_3
from vidgen.models.text import OPENSORA_PLAN_V1_3_NEGATIVE_PROMPT, T5TextEncoder

from . import adapters
from .folders import Parts, needed
from .references import is_image, read_reference
from .settings import Job, Request, size_problems
from .wfvae import decode as decode
from .wfvae import latent_shape as latent_shape
from .wfvae import load_vae as load_vae
from .wfvae import read_vae_config as read_vae_config
from .wfvae import video_factors as video_factors

DEFAULTS: dict[str, Any] = {
    "steps": 100,
    "guidance": 7.5,
    "guidance_rescale": 0.0,
    "negative_prompt": OPENSORA_PLAN_V1_3_NEGATIVE_PROMPT,
    "condition": None,  # None: i2v for one image, transition for two, continuation for a video
    "noise_strength": 0.0,
    "refiner": None,
}
GIVEN_WHOLE = ("continuation", "random_temporal", "clear")  # conditions that take a video


def transformer_class(parts: Parts) -> type[OpenSoraT2V_v1_3]:
    """The class that the transformer's configuration names."""
    name = read_json(parts.transformer / "config.json").get("_class_name")
    return OpenSoraInpaint_v1_3 if name == OpenSoraInpaint_v1_3.__name__ else OpenSoraT2V_v1_3


def model_config(parts: Parts) -> OpenSoraConfig:
    return read_config(transformer_class(parts), parts.transformer)


def kind(job: Job, request: Request) -> str:
    """Which frames the references of a request give, one of `MASK_TYPES`; "t2v" for a text-to-video model."""
    if transformer_class(job.parts) is OpenSoraT2V_v1_3:
        return "t2v"
    if job.settings.condition is not None:
        return job.settings.condition
    if len(request.references) == 2:
        return "transition"
    if not request.references:
        return "t2iv"
    return "i2v" if is_image(request.references[0]) else "continuation"


def problems(job: Job, requests: Sequence[Request]) -> list[str]:
    """What cannot be sampled, in words; empty when all is well."""
    step, side = video_factors(read_vae_config(needed(job.parts.vae)))
    found = size_problems(job, step, side * model_config(job.parts).patch_size, side)
    if not needed(job.settings.noise_strength) >= 0:
        found.append(f"noise_strength must not be negative, got {job.settings.noise_strength}")
    chosen = job.settings.condition
    if chosen is not None and chosen not in MASK_TYPES:
        return [*found, f"condition must be one of {', '.join(MASK_TYPES)}, got {chosen!r}"]
    for request in requests:
        found += [f"{problem} ({request.prompt!r})" for problem in _reference_problems(job, request)]
    return found


def _reference_problems(job: Job, request: Request) -> list[str]:
    given, type_ = request.references, kind(job, request)
    if type_ == "t2v":
        asked = job.settings.condition not in (None, "t2iv")
        return ["a text-to-video model takes no images and no videos"] if given or asked else []
    if type_ == "t2iv":
        return ["condition t2iv takes no images and no videos"] if given else []
    if type_ in GIVEN_WHOLE:
        video = len(given) == 1 and not is_image(given[0])
        return [] if video else [f"condition {type_} needs one video"]
    count = {"i2v": 1, "transition": 2}[type_]
    if len(given) != count:
        return [f"condition {type_} needs {count} image{'s' * (count > 1)}, got {len(given)}"]
    return [f"condition {type_} needs at least 2 frames"] if job.frames == 1 and type_ == "transition" else []


def load_encoders(parts: Parts, dtype: torch.dtype, device: torch.device) -> T5TextEncoder:
    return T5TextEncoder.from_pretrained(
        needed(parts.t5), parts.t5_max_length, tokenizer_folder=parts.tokenizer("t5"), dtype=dtype
    ).to(device)


def encode_text(encoder: T5TextEncoder, text: str) -> dict[str, Tensor]:
    """Tokens and mask under the transformer's argument names, ``(1, ...)`` each."""
    hidden, mask = encoder.encode([text])
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def texts(job: Job, request: Request) -> tuple[str, str]:
    """The positive and the negative text of a request, as the encoder is to see them."""
    return job.parts.prompt_prefix + request.prompt, job.negative(request)


def load_transformer(parts: Parts, dtype: torch.dtype, device: torch.device) -> OpenSoraT2V_v1_3:
    return adapters.load_transformer(transformer_class(parts), parts, dtype, device)


def conditioned(job: Job, request: Request) -> bool:
    """Whether the request has conditions that the VAE must encode: an inpainting model also sees that nothing is."""
    return kind(job, request) != "t2v"


def conditions(vae: WFVAE, job: Job, request: Request, seed: int) -> dict[str, Tensor]:
    """Latent of what is given, a sample of the posterior, and the compressed mask, ``(1, ..., frames, height, width)``.

    Everything is drawn from a generator of its own with the request's seed.
    """
    generator = torch.Generator().manual_seed(seed)
    video, mask = given_video(job, request, generator)
    strength = needed(job.settings.noise_strength)
    if strength > 0:
        levels = condition_noise_levels(
            1, log_mean=math.log(strength), log_std=0.01, skip_probability=0.0, generator=generator
        )
        video = add_condition_noise(video, mask, levels, torch.randn(video.shape, generator=generator))
    latent = vae.encode(video.to(job.device, job.dtype), generator=generator)
    sizes = {"frames_per_latent": vae.frames_per_latent, "pixels_per_latent": vae.pixels_per_latent}
    small = compress_mask(mask.expand(1, 1, job.frames, job.height, job.width), **sizes)
    return {"given": torch.cat([latent, small.to(latent)], 1)}


def given_video(job: Job, request: Request, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(1, 3, frames, height, width)``, black where nothing is given, and its mask ``(1, 1, frames, 1, 1)``."""
    type_ = kind(job, request)
    read = [read_reference(path, job.height, job.width, fps=job.fps) for path in request.references]
    if type_ == "t2iv":
        video, mask = torch.full((3, job.frames, job.height, job.width), BLACK), torch.ones(job.frames)
    elif type_ in ("i2v", "transition"):
        frames = torch.cat([read[0][:, :1], *(clip[:, -1:] for clip in read[1:])], 1)
        video, mask = place_frames(frames, (0, -1)[: len(read)], job.frames)
    elif type_ == "continuation":
        count = read[0].shape[1]
        if count >= job.frames:
            raise ValueError(
                f"sample: {request.references[0]} has {count} frames at {job.fps:g} per second, which leaves nothing "
                f"of {job.frames} to generate; wanted a shorter video or more frames"
            )
        video, mask = place_frames(read[0], range(count), job.frames)
    else:
        if read[0].shape[1] < job.frames:
            raise ValueError(
                f"sample: condition {type_} needs a video of {job.frames} frames, {request.references[0]} has "
                f"{read[0].shape[1]}"
            )
        video, mask = read[0][:, : job.frames], frame_mask(type_, job.frames, generator=generator)
        video = hide_generated(video, mask.view(1, -1, 1, 1))
    return video[None], mask.view(1, 1, -1, 1, 1)


def predictions(job: Job, kind: str) -> int:
    """How many predictions of the transformer a step of one video needs at once."""
    return 2 if needed(job.settings.guidance) > 1 else 1


def sample_latents(
    transformer: OpenSoraT2V_v1_3,
    job: Job,
    kind: str,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    given: dict[str, Tensor],
    seeds: Sequence[int],
) -> Tensor:
    """Latents ``(batch, channels, frames, height, width)`` of a batch of texts and conditions.

    Noise, that of every step too, is drawn on the CPU, for each video from a generator of its own.
    """
    settings = job.settings
    schedule = euler_ancestral_schedule(needed(settings.steps))
    draws = Draws(seeds, (1, transformer.config.in_channels, *latent_shape(job)), len(schedule.timesteps), job)
    return sample_euler_ancestral(
        transformer,
        draws.draw(),
        schedule,
        positive,
        negative_conditioning=negative,
        given=given.get("given"),
        guidance_scale=needed(settings.guidance),
        guidance_rescale=needed(settings.guidance_rescale),
        step_noises=draws,
    )


class Draws(Sequence[Tensor]):
    """Noise for each step of each video, drawn when it is asked for, in their order."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], num_steps: int, job: Job) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.num_steps, self.job = tuple(shape), num_steps, job

    def draw(self) -> Tensor:
        noise = torch.cat([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return noise.to(self.job.device, self.job.dtype)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: Any) -> Any:
        return self.draw()
