# SPDX-License-Identifier: Apache-2.0
"""Prompts to videos: encode the text, integrate the velocity from noise, decode, write mp4, sheet and json."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import __version__
from vidgen import device as devices
from vidgen.data.transforms import to_frames
from vidgen.data.video import contact_sheet, write_video
from vidgen.diffusion import sample, shifted_linear_schedule
from vidgen.io import write_json
from vidgen.models.autoencoders.wfvae import WFVAE
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT
from vidgen.models.text import CLIPTextEncoder, T5TextEncoder, clean_caption

from .folders import Parts, find_parts

SHEET_FRAMES = 9  # of a video on its contact sheet


@dataclass(frozen=True)
class SampleSettings:
    """How to sample; None takes what the model was trained on. The defaults are those of Open-Sora Plan v1.5.

    Attributes:
        seed: of the first prompt's noise; the next prompts have the next seeds.
        steps: Euler steps.
        guidance: classifier-free guidance, none at 1.
        guidance_rescale: see `vidgen.diffusion.rescale_guidance`.
        shift: of the noise schedule.
        frames, height, width: of the video; 8n+1 frames, height and width multiples of 16.
        precision: of transformer and VAE, "fp32" or "bf16".
        vae, t5, clip: folders to use instead of the model's own.
    """

    seed: int = 0
    steps: int = 50
    guidance: float = 8.0
    guidance_rescale: float = 0.7
    shift: float = 7.0
    negative_prompt: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    device: str = "auto"
    precision: str = "fp32"
    vae: Path | None = None
    t5: Path | None = None
    clip: Path | None = None


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line; empty lines do not count. Raises ValueError where none is left."""
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def describe_sample(model: str | Path, settings: SampleSettings) -> dict[str, Any]:
    """What `sample_videos` would do, without loading weights: folders, settings and shapes."""
    parts, video = _resolve(model, settings)
    frames, height, width = video["frames"], video["height"], video["width"]
    return {
        "settings": _plain(settings),
        **{name: str(getattr(parts, name)) for name in ("transformer", "vae", "t5", "clip")},
        "video_shape": [3, frames, height, width],
        "latent_frames_height_width": [(frames - 1) // 8 + 1, height // 8, width // 8],
        "fps": video["fps"],
    }


def sample_videos(
    model: str | Path, prompts: Sequence[str], output: str | Path, settings: SampleSettings = SampleSettings()
) -> list[dict[str, Any]]:
    """Sample one video per prompt into ``output``: ``000_words.mp4``, ``.png`` (contact sheet) and ``.json``.

    Returns:
        What stands in each json, plus the paths ``video``, ``sheet`` and ``json``.

    Raises:
        ValueError: no prompts, settings that do not fit, or a model that is incomplete.
        FloatingPointError: the velocity is not finite.
    """
    if not prompts:
        raise ValueError("sample: no prompt given")
    parts, video = _resolve(model, settings)
    device = devices.resolve(settings.device)
    dtype = devices.compute_dtype(device, settings.precision)
    texts = [settings.negative_prompt, *(parts.prompt_prefix + prompt for prompt in prompts)]
    embeddings = encode_texts(parts, [clean_caption(text) for text in texts], device, dtype)
    transformer = SparseUMMDiT.from_pretrained(parts.transformer, dtype=dtype, device=device)
    vae = WFVAE.from_pretrained(_required(parts.vae), dtype=dtype, device=device)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    negative = {name: value[:1] for name, value in embeddings.items()}
    results = []
    for index, prompt in enumerate(prompts):
        began = time.monotonic()
        positive = {name: value[index + 1 : index + 2] for name, value in embeddings.items()}
        seed = settings.seed + index
        frames = generate(transformer, vae, positive, negative, video, settings, seed)
        facts = {
            "prompt": prompt,
            "seed": seed,
            "settings": {**_plain(settings), **video, "seed": seed},
            "prompt_prefix": parts.prompt_prefix,
            "model": str(parts.transformer),
            "model_config_sha256": hashlib.sha256((parts.transformer / "config.json").read_bytes()).hexdigest(),
            "vae": str(parts.vae),
            "versions": {"vidgen": __version__, "torch": torch.__version__},
            "device": devices.describe(device),
            "seconds": round(time.monotonic() - began, 3),
        }
        results.append(_write(frames, facts, output / f"{index:03d}_{_slug(prompt)}", video["fps"]))
    return results


def encode_texts(parts: Parts, texts: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both encoders' views of the texts, under the transformer's argument names; the encoders are let go again.

    Returns:
        ``encoder_hidden_states`` (texts, tokens, channels), ``encoder_attention_mask`` (texts, tokens) and
        ``pooled_projections`` (texts, channels).
    """
    t5 = T5TextEncoder.from_pretrained(
        _required(parts.t5), parts.t5_max_length, tokenizer_folder=parts.tokenizer("t5"), dtype=dtype
    ).to(device)
    hidden, mask = t5.encode(texts)
    clip = CLIPTextEncoder.from_pretrained(
        _required(parts.clip), parts.clip_max_length, tokenizer_folder=parts.tokenizer("clip"), dtype=dtype
    ).to(device)
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "pooled_projections": clip.encode(texts)}


@torch.no_grad()
def generate(
    transformer: SparseUMMDiT,
    vae: WFVAE,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    video: dict[str, Any],
    settings: SampleSettings,
    seed: int,
) -> Tensor:
    """One video as uint8 frames ``(frames, height, width, 3)``.

    The noise is drawn on the CPU, so that a seed means the same on every device.
    """
    weight = next(transformer.parameters())
    shape = (transformer.config.in_channels, (video["frames"] - 1) // 8 + 1, video["height"] // 8, video["width"] // 8)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    latent = sample(
        transformer,
        noise.to(weight.device, weight.dtype),
        shifted_linear_schedule(settings.steps, settings.shift),
        positive,
        negative_conditioning=negative,
        guidance_scale=settings.guidance,
        guidance_rescale=settings.guidance_rescale,
    )
    return to_frames(vae.decode(latent)[0].cpu())


def _resolve(model: str | Path, settings: SampleSettings) -> tuple[Parts, dict[str, Any]]:
    """The parts, and frames, height, width and fps of the video, checked."""
    parts = find_parts(model, vae=settings.vae, t5=settings.t5, clip=settings.clip)
    video = {
        "frames": settings.frames or parts.num_frames,
        "height": settings.height or parts.height,
        "width": settings.width or parts.width,
        "fps": settings.fps or parts.fps,
    }
    problems = []
    if video["frames"] < 1 or video["frames"] % 8 != 1:
        problems.append(f"frames must be 8n+1, got {video['frames']}")
    for name in ("height", "width"):
        if video[name] < 16 or video[name] % 16:
            problems.append(f"{name} must be a multiple of 16, got {video[name]}")
    for name in ("steps", "shift", "fps"):
        value = video["fps"] if name == "fps" else getattr(settings, name)
        if not value > 0:
            problems.append(f"{name} must be positive, got {value}")
    if not 0 <= settings.guidance_rescale <= 1:
        problems.append(f"guidance_rescale must lie in [0, 1], got {settings.guidance_rescale}")
    if problems:
        raise ValueError("sample: " + "; ".join(problems))
    return parts, video


def _write(frames: Tensor, facts: dict[str, Any], stem: Path, fps: float) -> dict[str, Any]:
    video, sheet, json_file = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".png", ".json"))
    write_video(video, frames, fps)
    contact_sheet(sheet, [(facts["prompt"], frames)], every=max(1, -(-len(frames) // SHEET_FRAMES)))
    write_json(json_file, facts)
    return {**facts, "video": str(video), "sheet": str(sheet), "json": str(json_file)}


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower())[:40].strip("_") or "prompt"


def _plain(settings: SampleSettings) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}


def _required(path: Path | None) -> Path:
    assert path is not None  # find_parts has seen to it
    return path
