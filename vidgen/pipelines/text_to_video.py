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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen import __version__
from vidgen import device as devices
from vidgen.data.transforms import to_frames
from vidgen.data.video import contact_sheet, write_video
from vidgen.io import atomic_path, write_json
from vidgen.models.text import PromptRefiner

from . import cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2
from .folders import PARTS, find_parts, needed
from .parallel import Crew, Spread, crew_of, in_lockstep, load_transformer
from .parallel import problems as spread_problems
from .prompts import read_prompts
from .settings import COMMON, Job, Request, SampleSettings, fill_in, plain

__all__ = ["SYSTEMS", "Request", "SampleSettings", "Spread", "describe_sample", "read_prompts", "sample_videos"]

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
    parts = {name: getattr(job.parts, name) for name in PARTS}
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
    model: str | Path,
    prompts: Sequence[str | Request],
    output: str | Path,
    settings: SampleSettings | None = None,
    spread: Spread | None = None,
) -> list[dict[str, Any]]:
    """Sample one video per request into ``output``: ``000_words.mp4``, ``.png`` (contact sheet) and ``.json``.

    Args:
        prompts: requests; a string is a request with nothing but a prompt.
        settings: default: those of the system.
        spread: over the processes that torchrun has started, or of the process group there is, which all call this;
            files are the same as those of one process. None: this process does all by itself.

    Returns:
        What stands in each json, plus the paths ``video``, ``sheet`` and ``json``.

    Raises:
        ValueError: no prompts, settings or references that do not fit, or a model that is incomplete.
        FloatingPointError: the transformer's output is not finite.
    """
    requests, settings = as_requests(prompts), settings or SampleSettings()
    if not requests:
        raise ValueError("sample: no prompt given")
    with crew_of(spread, settings.device) as (crew, device):
        job = crew.everyone.together(lambda: plan(model, settings, requests, device, crew))
        found = sample_with(crew, job, requests, Path(output))
        return [facts for _, facts in sorted(sum(crew.everyone.gather(found), []), key=lambda pair: pair[0])]


def sample_with(crew: Crew, job: Job, requests: Sequence[Request], output: Path) -> list[tuple[int, dict[str, Any]]]:
    """Sample this process's share of the requests; the numbers of those that it wrote, with what is returned of them.

    Each step is agreed upon: an error of one process is raised on all.
    """
    system, everyone = SYSTEMS[job.parts.system], crew.everyone
    own = crew.own(len(requests))
    # Who has no request of its own still takes part where weights are shared.
    numbers = own or ([len(requests) - 1] if crew.spread.shard else [])
    chosen = [requests[number] for number in numbers]
    if job.settings.image_model is not None:
        chosen = make_images(job, chosen, output, numbers, crew)

    def prepare() -> tuple[dict[str, str], list[tuple[str, str]], dict[str, Any], list[dict[str, Tensor]]]:
        refined = refine(job, chosen)
        texts = [system.texts(job, replace(request, prompt=refined[request.prompt])) for request in chosen]
        embeddings = encode_texts(job, [text for pair in texts for text in pair])
        return refined, texts, embeddings, encode_references(job, chosen, numbers)

    # The first process of a video encodes for the others, which so need no memory for it.
    refined, texts, embeddings, conditions = everyone.together(lambda: crew.video.on_first(prepare))
    kinds = [system.kind(job, request) for request in chosen]
    latents, seconds = sample_all(job, kinds, texts, embeddings, conditions, numbers, crew)

    vae = everyone.together(lambda: system.load_vae(job.parts, job.dtype, job.device) if own else None)

    def write(index: int, number: int) -> list[tuple[int, dict[str, Any]]]:
        request, began = chosen[index], time.monotonic()
        chunks = decoded(vae, job, latents[index], crew.video_group)
        stem = output / _stem(number, request)
        video, sheet, json_file = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".png", ".json"))
        try:
            if crew.video.is_first:
                output.mkdir(parents=True, exist_ok=True)
                write_frames(chunks, video, sheet, request.prompt, job)
        finally:
            for _ in chunks:  # all decode to the end, whoever writes and whatever happens to it
                pass
        if not crew.video.is_first:
            return []
        facts = facts_about(job, request, number)
        if job.settings.refiner is not None:
            facts["refined_prompt"] = refined[request.prompt]
        facts["seconds"] = round(seconds[index] + time.monotonic() - began, 3)
        write_json(json_file, facts)
        return [(number, {**facts, "video": str(video), "sheet": str(sheet), "json": str(json_file)})]

    def write_all() -> list[tuple[int, dict[str, Any]]]:
        return [one for i, n in enumerate(own) for one in crew.video.together(partial(write, i, n))]

    return everyone.together(write_all)


def plan(
    model: str | Path,
    settings: SampleSettings,
    requests: Sequence[Request],
    device: torch.device | None = None,
    crew: Crew | None = None,
) -> Job:
    """The job, with everything checked that can be checked without weights. Raises ValueError.

    ``device`` is the one of this process; None: what the settings say.
    """
    parts = find_parts(model, vae=settings.vae, t5=settings.t5, clip=settings.clip, lora=settings.lora)
    system = SYSTEMS[parts.system]
    device = device or devices.resolve(settings.device)
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
    if crew is not None and not problems:
        problems = spread_problems(system, job, crew, [system.kind(job, request) for request in requests])
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
def make_images(
    job: Job, requests: Sequence[Request], output: Path, numbers: Sequence[int], crew: Crew
) -> list[Request]:
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
    everyone = crew.everyone
    one = everyone.together(lambda: plan(needed(job.settings.image_model), settings, requests, job.device))
    texts = [(request.prompt, "") for request in requests]
    flat = [text for pair in texts for text in pair]
    embeddings = everyone.together(lambda: crew.video.on_first(lambda: encode_texts(one, flat)))
    latents, _ = sample_all(one, ["t2v"] * len(texts), texts, embeddings, [{} for _ in texts], numbers, crew)
    paths = [output / f"{_stem(number, request)}_image.png" for number, request in zip(numbers, requests, strict=True)]

    def write() -> None:
        if not crew.video.is_first or not requests:
            return
        vae = SYSTEMS[one.parts.system].load_vae(one.parts, one.dtype, one.device)
        output.mkdir(parents=True, exist_ok=True)
        for path, latent in zip(paths, latents, strict=True):
            frame = next(decoded(vae, one, latent))[0]
            with atomic_path(path) as temporary:
                Image.frombytes("RGB", (job.width, job.height), frame.numpy().tobytes()).save(temporary, format="PNG")

    everyone.together(write)
    return [replace(request, references=(path,)) for request, path in zip(requests, paths, strict=True)]


def encode_texts(job: Job, texts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """What the encoders make of each text, on the CPU; one by one, so that a text does not depend on its neighbours."""
    system = SYSTEMS[job.parts.system]
    if not texts:
        return {}
    encoders = system.load_encoders(job.parts, job.dtype, job.device)
    return {text: on(torch.device("cpu"), system.encode_text(encoders, text)) for text in dict.fromkeys(texts)}


@torch.no_grad()
def encode_references(
    job: Job, requests: Sequence[Request], numbers: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """The conditions of each request, on the CPU; empty where it has none. Its seed follows from its number."""
    system = SYSTEMS[job.parts.system]
    if not any(system.conditioned(job, request) for request in requests):
        return [{} for _ in requests]
    vae = system.load_vae(job.parts, job.dtype, job.device)
    seeds = [job.settings.seed + number for number in numbers or range(len(requests))]
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
    numbers: Sequence[int] | None = None,
    crew: Crew | None = None,
) -> tuple[list[Tensor], list[float]]:
    """A latent ``(1, ...)`` on the CPU for each pair of texts, and the seconds that it took.

    Neighbours of one kind pass the transformer together. The seed of each follows from its number.
    """
    system, crew = SYSTEMS[job.parts.system], crew or Crew()
    numbers = range(len(texts)) if numbers is None else numbers
    batches = crew.rounds(batches_of(kinds, job.settings.batch_size))
    transformer = load_transformer(system, job, crew, kinds)
    latents: list[Tensor] = []
    seconds: list[float] = []

    def sample() -> None:
        for batch, counts in batches:
            began = time.monotonic()
            entries = [[embeddings[texts[i][side]] for i in batch] for side in (0, 1)]
            given = on(job.device, concatenate([conditions[i] for i in batch]))
            positive, negative = (on(job.device, concatenate(side)) for side in entries)
            seeds = [job.settings.seed + numbers[i] for i in batch]
            result = system.sample_latents(transformer, job, kinds[batch[0]], positive, negative, given, seeds).cpu()
            if counts:
                latents.extend(result.split(1))
                seconds.extend([(time.monotonic() - began) / len(batch)] * len(batch))

    in_lockstep(crew, sample)
    return latents, seconds


def batches_of(kinds: Sequence[str], size: int) -> list[list[int]]:
    """Neighbours of one kind, at most so many."""
    batches: list[list[int]] = []
    for i, kind in enumerate(kinds):
        if batches and len(batches[-1]) < size and kinds[batches[-1][0]] == kind:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def concatenate(entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors ``(1, ...)`` of several requests as batches."""
    return {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


@torch.no_grad()
def decoded(vae: Any, job: Job, latent: Tensor, group: dist.ProcessGroup | None = None) -> Iterator[Tensor]:
    """The frames of one latent as uint8 ``(frames, height, width, 3)``, chunk by chunk; of a group on its first."""
    for chunk in SYSTEMS[job.parts.system].decode(vae, job, latent.to(job.device), group):
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
        "lora": job.parts.lora and str(job.parts.lora),
        "versions": {"vidgen": __version__, "torch": torch.__version__},
        "device": devices.describe(job.device),
    }


def _stem(index: int, request: Request) -> str:
    """The beginning of the names of a request's files."""
    words = re.sub(r"[^a-z0-9]+", "_", (request.name or request.prompt).lower())[:40].strip("_")
    return f"{index:03d}_{words or 'prompt'}"
