# SPDX-License-Identifier: Apache-2.0
"""Train, save, resume and sample through the command line with ``device: npu``, against the same on the CPU."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vidgen import cli, demo, environment
from vidgen.models.text import save_tiny_text_encoders

from .emulator import NpuEmulator
from .emulator_reference import REFERENCE
from .systems import build_vae

CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = {
    "opensora_plan_v1_3": {"multilingual": True},
    "opensora_plan_v1_5": {},
    "opensora_v2": {"clip_projected": False},
    "cogvideox": {},
}
STEPS = 2


def train_resume_sample(system: str, folder: str) -> None:
    root = Path(folder)
    recipe = prepare(system, "t2v_tiny", root)
    with NpuEmulator(REFERENCE) as emulator:
        train(recipe, root, "npu", "resumed", STEPS // 2)
        train(recipe, root, "npu", "resumed", STEPS)
        train(recipe, root, "npu", "whole", STEPS)
        sample(root, "npu", "whole")
    train(recipe, root, "cpu", "cpu", STEPS)
    sample(root, "cpu", "cpu")
    assert losses(root / "resumed") == losses(root / "whole") and len(losses(root / "whole")) == STEPS
    assert_same(weights(root / "resumed"), weights(root / "whole"), 0)
    assert_equal_runs(root, "whole", "cpu")
    assert emulator.calls["npu::npu_fusion_attention"] and emulator.calls["npu::npu_fusion_attention_grad"]


def image_to_video(system: str, folder: str) -> None:
    root = Path(folder)
    recipe = prepare(system, "i2v_tiny", root)
    image = root / "image.png"
    Image.radial_gradient("L").resize((48, 32)).convert("RGB").save(image)
    with NpuEmulator(REFERENCE):
        train(recipe, root, "npu", "npu", STEPS)
        sample(root, "npu", "npu", "--image", str(image))
    train(recipe, root, "cpu", "cpu", STEPS)
    sample(root, "cpu", "cpu", "--image", str(image))
    assert_equal_runs(root, "npu", "cpu")


def autoencoder(folder: str) -> None:
    root = Path(folder)
    recipe = prepare("opensora_plan_v1_5", "wfvae_tiny", root)
    clip = str(next((root / "clips").glob("*.mp4")))
    size = ["--frames", "9", "--height", "32", "--width", "48"]

    def reconstruct(device: str, run: str) -> None:
        videos = ["--vae", str(root / run), "--output", str(root / f"{run}_videos"), "--device", device]
        command(["reconstruct", clip, *videos, *size])

    with NpuEmulator(REFERENCE):
        train(recipe, root, "npu", "npu", STEPS)
        reconstruct("npu", "npu")
    train(recipe, root, "cpu", "cpu", STEPS)
    reconstruct("cpu", "cpu")
    assert_equal_runs(root, "npu", "cpu")


def bfloat16(system: str, folder: str) -> None:
    """In bfloat16, recomputing activations, with the profiler: the first loss is about the CPU's."""
    root = Path(folder)
    recipe = prepare(system, "t2v_tiny", root)
    options = ["--training.precision", "bf16", "--training.activation_checkpointing", "true"]
    with NpuEmulator(REFERENCE):
        train([*recipe, *options], root, "npu", "npu", 3, "--profile", "1")
    train([*recipe, *options], root, "cpu", "cpu", 1)
    torch.testing.assert_close(losses(root / "npu")[:1], losses(root / "cpu"), rtol=2e-2, atol=0)
    summary = json.loads((root / "npu" / "profile" / "summary.json").read_text())
    assert summary["flops_per_step"] > 1e6 and summary["device"].startswith("npu (Ascend"), summary


def environment_report() -> None:
    printed = io.StringIO()
    with NpuEmulator(REFERENCE), contextlib.redirect_stdout(printed):
        command(["env"])
        facts = environment.report()
    lines = printed.getvalue().splitlines()
    (device,) = (line for line in lines if line.startswith("device npu"))
    assert device.split()[2] == "yes;" and device.endswith("hccl"), device
    assert any("stand-in libraries compute nothing" in line for line in lines), lines  # nobody is to be deceived
    assert facts["ops"]["attention"][("npu", "npu_torch")] is None, facts["ops"]["attention"]


def prepare(system: str, recipe: str, root: Path) -> list[str]:
    """Write what the recipe needs; the recipe with changes, as words of the command line."""
    torch.manual_seed(0)
    values = {
        "data.path": demo.copy_clips(root / "clips"),
        "data.num_frames": 9,
        "data.height": 32,
        "data.width": 48,
        "training.batch_size": 2,
        "training.checkpoint_every": 1,
        "optimizer.eps": 1e-4,  # of a gradient far below it, which is rounding where the true one is 0, little matters
    }
    if recipe != "wfvae_tiny":
        build_vae(system, "tiny").save_pretrained(root / "vae")
        t5, clip = save_tiny_text_encoders(root / "text", t5_channels=64, clip_channels=64, **TEXTS[system])
        values |= {"vae": root / "vae", "text.t5": t5, "text.clip": clip, "text.t5_max_length": 16}
        if system.startswith("opensora_plan"):  # the tiny autoencoders' latents have 4 channels
            values |= {"model.in_channels": 4, "model.out_channels": 4}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [str(CONFIGS / system / f"{recipe}.yaml"), *words]


def train(recipe: list[str], root: Path, device: str, run: str, steps: int, *more: str) -> None:
    # each device has a cache of features of its own: to meet those of the other would hide the encoders
    own = ["--device", device, "--output", str(root / run), "--data.cache", str(root / f"cache_{device}")]
    command(["train", *recipe, *own, "--training.steps", str(steps), *more])


def sample(root: Path, device: str, run: str, *more: str) -> None:
    size = ["--frames", "9", "--height", "32", "--width", "48", "--steps", "2", "--seed", "3", *more]
    words = ["--model", str(root / run), "--prompt", "a man talks", "--output", str(root / f"{run}_videos")]
    command(["sample", *words, *size, "--device", device])


def assert_equal_runs(root: Path, npu: str, cpu: str) -> None:
    report = json.loads((root / npu / "report.json").read_text())
    assert report["finished"] and report["device"].startswith("npu (Ascend"), report
    torch.testing.assert_close(losses(root / npu), losses(root / cpu), rtol=1e-5, atol=1e-5)
    assert_same(weights(root / npu), weights(root / cpu), 1e-5)
    # colours are rounded to 256 steps
    assert_same({"frames": frames(root / f"{npu}_videos")}, {"frames": frames(root / f"{cpu}_videos")}, 1)


def command(words: list[str]) -> None:
    code = cli.main(["--traceback", *words])
    assert code == 0, f"vidgen {' '.join(words)} ended with {code}"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    folder = run / f"step_{STEPS:08d}"
    return {
        f"{kind} {name}": value
        for kind in ("model", "ema")
        for name, value in load_file(folder / kind / "diffusion_pytorch_model.safetensors").items()
    }


def frames(folder: Path) -> Tensor:
    """The sheet of frames below its label: pictures from before x264."""
    (path,) = folder.glob("*.png")
    with Image.open(path) as sheet:
        pixels = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(sheet.height, sheet.width, 3)[20:].float()


def assert_same(got: dict[str, Any], wanted: dict[str, Any], limit: float) -> None:
    assert got.keys() == wanted.keys()
    errors = {name: float((got[name] - value).abs().max()) for name, value in wanted.items()}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, wrong
