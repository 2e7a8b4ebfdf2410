# SPDX-License-Identifier: Apache-2.0
"""A clip through a VAE and back: how much of the picture survives the latent."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import __version__
from vidgen import device as devices
from vidgen.data.transforms import frame_indices, resize_crop, to_frames
from vidgen.data.video import VideoError, contact_sheet, open_video, write_video
from vidgen.evaluation.metrics import psnr, ssim
from vidgen.io import read_json, write_json

from .folders import Parts, weights_folder
from .text_to_video import SYSTEMS

# The class of a VAE, as its config.json names it, and a system that it belongs to.
VAES = {
    "WFVAE": "opensora_plan_v1_5",
    "HunyuanVAE": "opensora_v2",
    "AutoencoderKLHunyuanVideo": "opensora_v2",
    "AutoencoderKLCogVideoX": "cogvideox",
}
SHEET_FRAMES = 9


@dataclass(frozen=True)
class ReconstructSettings:
    """Which part of the clip, at what size; None keeps the clip's own.

    Attributes:
        frames: a number that the VAE can encode (4n+1 or 8n+1), from frame ``start`` on.
        height, width: multiples of the VAE's 8; the clip is centre-cropped and resized.
        fps: frames per second to take from the clip.
    """

    frames: int = 17
    start: int = 0
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    device: str = "auto"
    precision: str = "fp32"


def reconstruct(
    clip: str | Path,
    vae: str | Path,
    output: str | Path,
    settings: ReconstructSettings = ReconstructSettings(),
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Encode and decode a clip; write ``NAME.mp4`` (original left, reconstruction right), ``.png`` and ``.json``.

    The latent is the posterior's mean. PSNR and SSIM compare the 8-bit frames, before the mp4 is compressed.

    Args:
        vae: a model folder, or the run that trained it.
        dry_run: return settings and shapes only.

    Returns:
        What stands in the json, plus the paths.

    Raises:
        ValueError: the clip cannot be read or is too short, settings that do not fit, or no model.
    """
    folder = weights_folder(vae)
    system = SYSTEMS[system_of(folder)]
    original, fps = read_clip(clip, settings, *system.video_factors(system.read_vae_config(folder)))
    facts: dict[str, Any] = {
        "clip": str(clip),
        "vae": str(folder),
        "first_frame": settings.start,
        "fps": fps,
        "video_shape": list(original.shape),
        "precision": settings.precision,
    }
    if dry_run:
        return facts
    device = devices.resolve(settings.device)
    dtype = devices.compute_dtype(device, settings.precision)
    model = system.load_vae(Parts(folder, vae=folder), dtype, device)
    began = time.monotonic()
    decoded, latent_shape = round_trip(model, original)
    seconds = round(time.monotonic() - began, 3)
    before, after = to_frames(original), to_frames(decoded)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"{Path(clip).stem}_reconstructed"
    video, sheet, json_file = (stem.with_name(stem.name + suffix) for suffix in (".mp4", ".png", ".json"))
    write_video(video, torch.cat([before, after], dim=2), fps)
    every = max(1, -(-len(before) // SHEET_FRAMES))
    contact_sheet(sheet, [("original", before), ("reconstruction", after)], every=every)
    decibels = float(psnr(to_video(after), to_video(before)))
    facts |= {
        "latent_shape": latent_shape,
        "psnr": decibels if math.isfinite(decibels) else None,  # None: the frames are equal
        "ssim": float(ssim(to_video(after), to_video(before))),
        "seconds": seconds,
        "versions": {"vidgen": __version__, "torch": torch.__version__},
        "device": devices.describe(device),
    }
    write_json(json_file, facts)
    return {**facts, "video": str(video), "sheet": str(sheet), "json": str(json_file)}


def system_of(folder: Path) -> str:
    """The system that the VAE in a folder belongs to. Raises ValueError for an unknown class."""
    values = read_json(folder / "config.json")
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name not in VAES:
        raise ValueError(f"reconstruct: {folder / 'config.json'}: wanted _class_name {', '.join(VAES)}, got {name!r}")
    return VAES[name]


def read_clip(
    clip: str | Path, settings: ReconstructSettings, frame_step: int = 8, side: int = 8
) -> tuple[Tensor, float]:
    """The wanted part of a clip as ``(3, frames, height, width)`` in [-1, 1], and its frames per second.

    Args:
        frame_step: frames must be a multiple of this and one more.
        side: height and width must be multiples of this.
    """
    if settings.frames < 1 or (settings.frames - 1) % frame_step:
        raise ValueError(f"reconstruct: frames must be {frame_step}n+1, got {settings.frames}")
    with open_video(clip) as reader:
        height, width = settings.height or reader.height // side * side, settings.width or reader.width // side * side
        if height < side or width < side or height % side or width % side:
            raise ValueError(f"reconstruct: height and width must be multiples of {side}, got {height} and {width}")
        left = reader.num_frames - settings.start
        if left < 1 or settings.start < 0:
            raise ValueError(f"reconstruct: start must lie in 0..{reader.num_frames - 1}, got {settings.start}")
        try:
            indices = frame_indices(left, reader.fps, settings.fps, settings.frames, start=settings.start)
        except VideoError as error:
            raise VideoError(f"{clip}: {error}") from error
        return resize_crop(reader.frames(indices), height, width), settings.fps or reader.fps


@torch.no_grad()
def round_trip(model: Any, video: Tensor) -> tuple[Tensor, list[int]]:
    """``decode(encode(video))`` of ``(3, frames, height, width)`` on the CPU, and the latent's shape."""
    weight = next(model.parameters())
    latent = model.encode(video[None].to(weight.device, weight.dtype))
    return model.decode(latent)[0].float().cpu(), list(latent.shape[1:])


def to_video(frames: Tensor) -> Tensor:
    """8-bit frames as a float video ``(1, 3, frames, height, width)`` in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1
