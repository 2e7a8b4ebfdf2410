# SPDX-License-Identifier: Apache-2.0
"""Training of every system at tiny size: it learns, it goes on as if it had never stopped, and its runs can sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vidgen.models import autoencoders
from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config
from vidgen.models.text import save_tiny_text_encoders
from vidgen.pipelines.text_to_video import SampleSettings, sample_videos
from vidgen.train.loop import train
from vidgen.train.metrics import read_metrics
from vidgen.train.recipe import load_recipe

WIDTHS = {"t5_channels": 20, "clip_channels": 12}
COG_5B = {"preset": "tiny-5b", "attention_head_dim": 32, "num_layers": 2}
# What to train, and what its options are.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "1.3": ("opensora_plan_v1_3", {"preset": "tiny"}, {"snr_gamma": 5.0, "noise_offset": 0.02}),
    "1.3 inpaint": ("opensora_plan_v1_3", {"preset": "tiny_i2v"}, {}),
    "2.0": ("opensora_v2", {"preset": "tiny"}, {}),
    "2.0 conditions": ("opensora_v2", {"preset": "tiny_i2v"}, {"reference_loss": False}),
    "2B": ("cogvideox", {"preset": "tiny-2b", "max_text_seq_length": 16}, {"dropped_text": "zeros"}),
    "5B": ("cogvideox", COG_5B, {"offset_noise": 0.1}),
    "1.5-5B": ("cogvideox", {"preset": "tiny-1.5"}, {}),
    "1.5-5B-I2V": ("cogvideox", {"preset": "tiny-1.5-i2v"}, {}),
}


@pytest.fixture(scope="session")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each system, random weights; posteriors so narrow that there is something to learn."""
    folder = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    wfvae = autoencoders.WFVAE(autoencoders.preset("tiny_4x8x8"))
    hunyuan = autoencoders.HunyuanVAE(hunyuan_vae_config.preset("tiny"))
    cogvideox = autoencoders.AutoencoderKLCogVideoX(cogvideox_vae_config.preset("tiny"))
    with torch.no_grad():
        for conv in (wfvae.encoder.conv_out.conv, hunyuan.quant_conv, cogvideox.encoder.conv_out.conv):
            conv.bias[4:] = -12
    wfvae.save_pretrained(folder / "opensora_plan_v1_3")
    hunyuan.save_pretrained(folder / "opensora_v2")
    cogvideox.save_pretrained(folder / "cogvideox")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    save_tiny_text_encoders(folder / "cogvideox", **WIDTHS)
    save_tiny_text_encoders(folder / "opensora_v2", **WIDTHS, clip_projected=False)
    save_tiny_text_encoders(folder / "opensora_plan_v1_3", **WIDTHS, multilingual=True)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def make(vaes, texts, parts, tmp_path) -> Callable[..., Any]:
    """``make("1.3", training={...})``: a tiny recipe with sections changed."""

    def build(case: str, **changes: Any) -> Any:
        system, model, diffusion = CASES[case]
        values: dict[str, Any] = {
            "system": system,
            "task": "dit",
            "output": tmp_path / "run",
            "model": model,
            "vae": vaes[system],
            "text": {"t5": texts[system] / "t5", "clip": texts[system] / "clip", "t5_max_length": 16},
            "data": {"path": parts / "clips.jsonl", "num_frames": 9, "height": 16, "width": 32, "fps": 25},
            "training": {"steps": 2, "checkpoint_every": 100, "precision": "fp32", "log_every": 100, "batch_size": 2},
            "diffusion": diffusion,
            "optimizer": {"lr": 5e-3, "ema_decay": 0.9},
            "clipping": {"method": "norm"},
            "seed": 5,
            "device": "cpu",
        }
        for name, section in changes.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return load_recipe(values)

    return build


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("case", ["1.3 inpaint", "2.0 conditions", "1.5-5B-I2V"])
def test_resumed_run_is_the_uninterrupted_one(make, tmp_path, case):
    train(make(case, output=tmp_path / "whole"))
    train(make(case, training={"steps": 1}))
    train(make(case))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name in ("model", "ema"):
        file = Path("step_00000002") / name / "diffusion_pytorch_model.safetensors"
        a, b = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("case", ["1.3", "2.0", "2B", "5B", "1.5-5B"])
def test_run_is_sampled_from(make, tmp_path, case):
    recipe = make(case)
    train(recipe)
    settings = SampleSettings(steps=2, guidance=2.0, device="cpu")
    (result,) = sample_videos(recipe.output, ["a man talks"], tmp_path / "out", settings)
    assert result["settings"]["frames"] == 9 and result["prompt_prefix"] == ""
