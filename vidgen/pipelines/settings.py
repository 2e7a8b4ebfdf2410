# SPDX-License-Identifier: Apache-2.0
"""What is asked of a pipeline: settings for all videos, a request for each, and the job that they amount to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .folders import Parts


@dataclass(frozen=True)
class SampleSettings:
    """How to sample. None takes what the model was trained on or what its system was released with.

    The settings after ``batch_size`` belong to some systems only; giving one that the model's system does not have is
    an error.

    Attributes:
        seed: of the first request's noise; the next requests have the next seeds.
        frames, height, width: of the video, as the model's VAE and patches allow.
        precision: of transformer and VAE, "fp32" or "bf16".
        vae, t5, clip: folders to use instead of the model's own; ``t5`` is the mT5 of Open-Sora Plan 1.3.
        lora: folder of adapters, in peft's files, for the transformer, or the run that trained them.
        batch_size: requests that pass the transformer together; a video does not depend on it.
        tile_size: side of the spatial tiles of the VAE's decoder in pixels; None decodes as the VAE's folder says.
        steps: of the sampler.
        guidance: classifier-free guidance, none at 1.
        negative_prompt: what the guidance leads away from.
        guidance_rescale: see `vidgen.diffusion.rescale_guidance`.
        shift: of the noise schedule.
        sampler: "ddim" or "dpm".
        dynamic_guidance: let the guidance follow the timestep, as CogVideoX does.
        zero_negative: an embedding of zeros instead of that of the negative prompt.
        condition: which frames the references give: the names are the system's.
        image_guidance: guidance by the references, none at 1.
        text_oscillation, image_oscillation, temporal_oscillation: weaken the guidance at every second step, and over
            the frames.
        image_model: folder of a text-to-image model that makes the reference.
        tile_frames: videos of more frames than this are decoded in tiles of time, where the VAE cannot decode a
            stream; 0 decodes as the VAE's folder says.
        noise_strength: of the noise that is put on the references.
        refiner: folder of a language model that rewrites the prompts.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    shift: float | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    device: str = "auto"
    precision: str = "fp32"
    vae: Path | None = None
    t5: Path | None = None
    clip: Path | None = None
    lora: Path | None = None
    batch_size: int = 1
    tile_size: int | None = None
    sampler: str | None = None
    dynamic_guidance: bool | None = None
    zero_negative: bool | None = None
    condition: str | None = None
    image_guidance: float | None = None
    text_oscillation: bool | None = None
    image_oscillation: bool | None = None
    temporal_oscillation: bool | None = None
    image_model: Path | None = None
    tile_frames: int | None = None
    noise_strength: float | None = None
    refiner: Path | None = None


PIXELS_AT_ONCE = 1 << 18  # decoded together, where that is more than two frames of latent
# Those that every system has.
COMMON = (
    *("seed", "frames", "height", "width", "fps", "device", "precision", "vae", "t5", "clip", "lora"),
    *("batch_size", "tile_size"),
)


@dataclass(frozen=True)
class Request:
    """One video: a prompt, files that show some of its frames, and what differs from the settings."""

    prompt: str
    references: tuple[Path, ...] = ()
    negative_prompt: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Job:
    """Settings of a known model, with nothing left open."""

    parts: Parts
    settings: SampleSettings
    frames: int
    height: int
    width: int
    fps: float
    device: torch.device
    dtype: torch.dtype

    def negative(self, request: Request) -> str:
        """The negative prompt of a request."""
        own = request.negative_prompt
        return own if own is not None else self.settings.negative_prompt or ""


def fill_in(settings: SampleSettings, defaults: Mapping[str, Any], system: str) -> SampleSettings:
    """The settings with the system's own defaults. Raises ValueError for one that the system does not have."""
    given = {name for name, value in asdict(settings).items() if value is not None and name not in COMMON}
    if foreign := sorted(given - defaults.keys()):
        raise ValueError(f"sample: {system} has no setting {', '.join(foreign)}; it has {', '.join(sorted(defaults))}")
    return replace(settings, **{name: value for name, value in defaults.items() if name not in given})


def plain(settings: SampleSettings, names: Iterable[str]) -> dict[str, Any]:
    """The named settings for JSON."""
    values = {name: getattr(settings, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def size_problems(job: Job, frames_per_latent: int, multiple: int, pixels_per_latent: int = 8) -> list[str]:
    """What is wrong with the frames, height, width and numbers that every system has, in words."""
    problems, tile = [], job.settings.tile_size
    if tile is not None and (tile < pixels_per_latent or tile % pixels_per_latent):
        problems.append(f"tile_size must be a multiple of {pixels_per_latent}, got {tile}")
    if job.frames < 1 or (job.frames - 1) % frames_per_latent:
        problems.append(f"frames must be {frames_per_latent}n+1, got {job.frames}")
    for name in ("height", "width"):
        if getattr(job, name) < multiple or getattr(job, name) % multiple:
            problems.append(f"{name} must be a multiple of {multiple}, got {getattr(job, name)}")
    for name in ("steps", "shift", "fps", "batch_size"):
        value = job.fps if name == "fps" else getattr(job.settings, name)
        if value is not None and not value > 0:
            problems.append(f"{name} must be positive, got {value}")
    rescale = job.settings.guidance_rescale
    if rescale is not None and not 0 <= rescale <= 1:
        problems.append(f"guidance_rescale must lie in [0, 1], got {rescale}")
    return problems


def chunk_latents(job: Job, frames_per_latent: int) -> int:
    """How many latent frames to decode at once: what memory must hold does not grow with the number of frames."""
    return max(2, PIXELS_AT_ONCE // (job.height * job.width * frames_per_latent))
