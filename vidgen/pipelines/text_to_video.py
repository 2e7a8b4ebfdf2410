# SPDX-License-Identifier: Apache-2.0
"""Prompts to videos, for every system: encode the texts, sample latents, decode, write mp4, sheet and json.

Only one kind of model is in memory at a time: first what rewrites prompts and makes images, then the text encoders,
then the VAE where references are given, then the transformer, then the VAE again, whose frames go into the video file
as they are decoded. How each of these works is said in the module of the system; it has the functions

    latent_shape, kind, problems        what is asked for, and whether it fits
    texts, conditioned                  what must be encoded
    load_encoders, encode_text          one text to tensors
    load_vae, conditions, decode        references to tensors, a latent to frames
    load_transformer, sample_latents    a batch of texts and conditions to latents
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import __version__
from vidgen import device as devices
from vidgen.data.transforms import to_frames
from vidgen.data.video import contact_sheet, write_video
from vidgen.io import atomic_path, write_json
from vidgen.models.text import PromptRefiner

from . import cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2
from .folders import find_parts, needed
from .prompts import read_prompts
from .settings import COMMON, Job, Request, SampleSettings, fill_in, plain

__all__ = ["SYSTEMS", "Request", "SampleSettings", "describe_sample", "read_prompts", "sample_videos"]

SYSTEMS: dict[str, Any] = {
    "opensora_plan_v1_3": opensora_plan_v1_3,
    "opensora_plan_v1_5": opensora_plan_v1_5,
    "opensora_v2": opensora_v2,
    "cogvideox": cogvideox,
}
SHEET_FRAMES = 9  # of a video on its contact sheet
IMAGE_GUIDANCE = 4.0  # that text-to-image models are told (Open-Sora 2.0)


def describe_sample(
    model: str | Path, settings: SampleSettings, prompts: Sequence[str | Request] = ()
) -> dict[str, Any]:
    """What `sample_videos` would do, without loading weights: system, folders, settings and shapes."""
    job = plan(model, settings, as_requests(prompts))
    parts = {name: getattr(job.parts, name) for name in ("transformer", "vae", "t5", "clip")}
    return {
        "system": job.parts.system,
        "settings": facts_of(job),
        **{name: str(folder) for name, folder in parts.items() if folder is not None},
        "video_shape": [3, job.frames, job.height, job.width],
        "latent_frames_height_width": SYSTEMS[job.parts.system].latent_shape(job),
        "fps": job.fps,
        "videos": len(prompts),
    }


def sample_videos(
    model: str | Path, prompts: Sequence[str | Request], output: str | Path, settings: SampleSettings | None = None
) -> list[dict[str, Any]]:
    """Sample one video per request into ``output``: ``000_words.mp4``, ``.png`` (contact sheet) and ``.json``.

    Args:
        prompts: requests; a string is a request with nothing but a prompt.
        settings: default: those of the system.

    Returns:
        What stands in each json, plus the paths ``video``, ``sheet`` and ``json``.

    Raises:
        ValueError: no prompts, settings or references that do not fit, or a model that is incomplete.
        FloatingPointError: the transformer's output is not finite.
    """
    requests = as_requests(prompts)
    if not requests:
        raise ValueError("sample: no prompt given")
    job = plan(model, settings or SampleSettings(), requests)
    system = SYSTEMS[job.parts.system]
    output = Path(output)
    if job.settings.image_model is not None:
        requests = make_images(job, requests, output)
    refined = refine(job, requests)
    texts = [system.texts(job, replace(request, prompt=refined[request.prompt])) for request in requests]
    embeddings = encode_texts(job, [text for pair in texts for text in pair])
    conditions = encode_references(job, requests)
    kinds = [system.kind(job, request) for request in requests]
    latents, seconds = sample_all(job, kinds, texts, embeddings, conditions)

    output.mkdir(parents=True, exist_ok=True)
    vae = system.load_vae(job.parts, job.dtype, job.device)
    results = []
    for index, (request, latent) in enumerate(zip(requests, latents, strict=True)):
        began = time.monotonic()
        stem = output / _stem(index, request)
        video, sheet, json_file = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".png", ".json"))
        write_frames(decoded(vae, job, latent), video, sheet, request.prompt, job)
        facts = facts_about(job, request, index)
        if job.settings.refiner is not None:
            facts["refined_prompt"] = refined[request.prompt]
        facts["seconds"] = round(seconds[index] + time.monotonic() - began, 3)
        write_json(json_file, facts)
        results.append({**facts, "video": str(video), "sheet": str(sheet), "json": str(json_file)})
    return results


def plan(model: str | Path, settings: SampleSettings, requests: Sequence[Request]) -> Job:
    """The job, with everything checked that can be checked without weights. Raises ValueError."""
    parts = find_parts(model, vae=settings.vae, t5=settings.t5, clip=settings.clip)
    system = SYSTEMS[parts.system]
    device = devices.resolve(settings.device)
    job = Job(
        parts,
        fill_in(settings, system.DEFAULTS, parts.system),
        frames=parts.num_frames if settings.frames is None else settings.frames,
        height=parts.height if settings.height is None else settings.height,
        width=parts.width if settings.width is None else settings.width,
        fps=parts.fps if settings.fps is None else settings.fps,
        device=device,
        dtype=devices.compute_dtype(device, settings.precision),
    )
    missing = [str(path) for request in requests for path in request.references if not path.is_file()]
    problems = [f"there is no file {path}" for path in missing] or system.problems(job, requests)
    if problems:
        raise ValueError("sample: " + "; ".join(problems))
    return job


def as_requests(prompts: Sequence[str | Request]) -> list[Request]:
    return [prompt if isinstance(prompt, Request) else Request(prompt) for prompt in prompts]


def refine(job: Job, requests: Sequence[Request]) -> dict[str, str]:
    """Each prompt and what the refiner makes of it; itself where there is none, or where references are given."""
    if job.settings.refiner is None:
        return {request.prompt: request.prompt for request in requests}
    refiner = PromptRefiner.from_pretrained(job.settings.refiner, dtype=job.dtype).to(job.device)
    alone = {request.prompt for request in requests if not request.references}
    return {r.prompt: refiner.refine(r.prompt) if r.prompt in alone else r.prompt for r in requests}


@torch.no_grad()
def make_images(job: Job, requests: Sequence[Request], output: Path) -> list[Request]:
    """The requests with images that a text-to-image model makes of their prompts: files ``000_words_image.png``."""
    from PIL import Image

    settings = SampleSettings(
        seed=job.settings.seed,
        steps=job.settings.steps,
        guidance=IMAGE_GUIDANCE,
        frames=1,
        height=job.height,
        width=job.width,
        device=job.settings.device,
        precision=job.settings.precision,
        batch_size=job.settings.batch_size,
    )
    one = plan(needed(job.settings.image_model), settings, requests)
    texts = [(request.prompt, "") for request in requests]
    embeddings = encode_texts(one, [text for pair in texts for text in pair])
    latents, _ = sample_all(one, ["t2v"] * len(texts), texts, embeddings, [{} for _ in texts])
    vae = SYSTEMS[one.parts.system].load_vae(one.parts, one.dtype, one.device)
    output.mkdir(parents=True, exist_ok=True)
    result = []
    for index, (request, latent) in enumerate(zip(requests, latents, strict=True)):
        frame = next(decoded(vae, one, latent))[0]
        path = output / f"{_stem(index, request)}_image.png"
        with atomic_path(path) as temporary:
            Image.frombytes("RGB", (job.width, job.height), frame.numpy().tobytes()).save(temporary, format="PNG")
        result.append(replace(request, references=(path,)))
    return result


def encode_texts(job: Job, texts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """What the encoders make of each text, on the CPU; one by one, so that a text does not depend on its neighbours."""
    system = SYSTEMS[job.parts.system]
    encoders = system.load_encoders(job.parts, job.dtype, job.device)
    return {text: on(torch.device("cpu"), system.encode_text(encoders, text)) for text in dict.fromkeys(texts)}


@torch.no_grad()
def encode_references(job: Job, requests: Sequence[Request]) -> list[dict[str, Tensor]]:
    """The conditions of each request, on the CPU; empty where it has none."""
    system = SYSTEMS[job.parts.system]
    if not any(system.conditioned(job, request) for request in requests):
        return [{} for _ in requests]
    vae = system.load_vae(job.parts, job.dtype, job.device)
    seeds = range(job.settings.seed, job.settings.seed + len(requests))
    return [
        on(torch.device("cpu"), system.conditions(vae, job, request, seed)) if system.conditioned(job, request) else {}
        for request, seed in zip(requests, seeds, strict=True)
    ]


@torch.no_grad()
def sample_all(
    job: Job,
    kinds: Sequence[str],
    texts: Sequence[tuple[str, str]],
    embeddings: dict[str, dict[str, Tensor]],
    conditions: Sequence[dict[str, Tensor]],
) -> tuple[list[Tensor], list[float]]:
    """A latent ``(1, ...)`` on the CPU for each pair of texts, and the seconds that it took.

    Neighbours of one kind pass the transformer together.
    """
    system = SYSTEMS[job.parts.system]
    transformer = system.load_transformer(job.parts, job.dtype, job.device)
    latents: list[Tensor] = []
    seconds: list[float] = []
    while (start := len(latents)) < len(texts):
        began = time.monotonic()
        stop = min(start + job.settings.batch_size, len(texts))
        batch = [i for i in range(start, stop) if len({*kinds[start : i + 1]}) == 1]
        entries = [[embeddings[texts[i][side]] for i in batch] for side in (0, 1)]
        positive, negative, given = (on(job.device, concatenate(e)) for e in (*entries, [conditions[i] for i in batch]))
        seeds = [job.settings.seed + i for i in batch]
        result = system.sample_latents(transformer, job, kinds[start], positive, negative, given, seeds).cpu()
        latents += result.split(1)
        seconds += [(time.monotonic() - began) / len(batch)] * len(batch)
    return latents, seconds


def concatenate(entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors ``(1, ...)`` of several requests as batches."""
    return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


@torch.no_grad()
def decoded(vae: Any, job: Job, latent: Tensor) -> Iterator[Tensor]:
    """The frames of one latent as uint8 ``(frames, height, width, 3)``, chunk by chunk."""
    for chunk in SYSTEMS[job.parts.system].decode(vae, job, latent.to(job.device)):
        frames = to_frames(chunk[0].cpu()) if chunk.shape[2] else None
        del chunk  # not while the next one is computed
        if frames is not None:
            yield frames


def write_frames(chunks: Iterator[Tensor], video: Path, sheet: Path, label: str, job: Job) -> None:
    """Write the video as its frames come, and the sheet of every so many of them."""
    every = max(1, -(-job.frames // SHEET_FRAMES))
    shown: list[Tensor] = []

    def noted() -> Iterator[Tensor]:
        done = 0
        for chunk in chunks:
            shown.append(chunk[-done % every :: every].clone())
            done += len(chunk)
            yield chunk

    write_video(video, noted(), job.fps)
    contact_sheet(sheet, [(label, torch.cat(shown))])


def facts_of(job: Job) -> dict[str, Any]:
    """The settings that this system has, with what was left open filled in."""
    facts = plain(job.settings, (*COMMON, *SYSTEMS[job.parts.system].DEFAULTS))
    return {**facts, "frames": job.frames, "height": job.height, "width": job.width, "fps": job.fps}


def facts_about(job: Job, request: Request, index: int) -> dict[str, Any]:
    """What stands in the json of one video."""
    seed = job.settings.seed + index
    return {
        "prompt": request.prompt,
        "references": [str(path) for path in request.references],
        "seed": seed,
        "settings": {**facts_of(job), "seed": seed},
        "prompt_prefix": job.parts.prompt_prefix,
        "system": job.parts.system,
        "model": str(job.parts.transformer),
        "model_config_sha256": hashlib.sha256((job.parts.transformer / "config.json").read_bytes()).hexdigest(),
        "vae": str(job.parts.vae),
        "versions": {"vidgen": __version__, "torch": torch.__version__},
        "device": devices.describe(job.device),
    }


def _stem(index: int, request: Request) -> str:
    """The beginning of the names of a request's files."""
    words = re.sub(r"[^a-z0-9]+", "_", (request.name or request.prompt).lower())[:40].strip("_")
    return f"{index:03d}_{words or 'prompt'}"
