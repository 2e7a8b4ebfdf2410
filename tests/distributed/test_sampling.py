# SPDX-License-Identifier: Apache-2.0
"""Sampling over four processes gives the videos of one, for every system and in every way to share the work."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("av", "PIL", "safetensors", "transformers"):
    pytest.importorskip(package)

from vidgen.models import autoencoders  # noqa: E402
from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config  # noqa: E402
from vidgen.models.text import save_tiny_text_encoders  # noqa: E402
from vidgen.ops.context_parallel import shard_sizes  # noqa: E402
from vidgen.pipelines.parallel import Spread, Transformer  # noqa: E402

from .pool import Pool  # noqa: E402
from .tiny import make_model  # noqa: E402

SMALL = {"seed": 3, "steps": 2, "frames": 9, "height": 32, "width": 48, "fps": 8.0, "device": "cpu", "guidance": 3.0}
TEXTS: dict[str, dict[str, Any]] = {
    "opensora_plan_v1_3": {"multilingual": True},
    "opensora_plan_v1_5": {},
    "opensora_v2": {"clip_projected": False},
    "cogvideox": {},
}


def save_vae(system: str, folder: Path) -> None:
    if system == "cogvideox":
        vae: Any = autoencoders.AutoencoderKLCogVideoX(cogvideox_vae_config.preset("tiny"))
    elif system == "opensora_v2":
        vae = autoencoders.HunyuanVAE(hunyuan_vae_config.preset("tiny"))
    else:
        vae = autoencoders.WFVAE(autoencoders.preset("tiny" if system == "opensora_plan_v1_5" else "tiny_4x8x8"))
    vae.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``folder_of("cogvideox", "tiny-5b")``: a model folder, made once."""
    made: dict[tuple[str, str], str] = {}

    def make(system: str, preset: str) -> str:
        if (system, preset) not in made:
            folder = tmp_path_factory.mktemp(preset)
            torch.manual_seed(0)
            save_vae(system, folder / "vae")
            make_model(system, preset).save_pretrained(folder / "transformer")
            t5, clip = save_tiny_text_encoders(folder, t5_channels=20, clip_channels=12, **TEXTS[system])
            t5.rename(folder / "text_encoder")
            if system in ("opensora_plan_v1_3", "cogvideox"):
                shutil.rmtree(clip)
            else:
                clip.rename(folder / "text_encoder_2")
            made[system, preset] = str(folder)
        return made[system, preset]

    return make


@pytest.fixture
def image(tmp_path: Path) -> str:
    from PIL import Image

    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.frombytes("RGB", (60, 40), bytes(pixels.flatten().tolist())).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@dataclass(frozen=True)
class Way:
    """A way to share the work, and what each process then does."""

    spread: dict[str, Any]
    predictions: list[list[int]]  # of each process, in each call of the transformer
    weights: float = 1.0  # at most this part of them is on each


# Model, its preset, prompts and whether an image is given; ways to share the work.
CASES: dict[str, tuple[str, str, list[tuple[str, bool]], dict[str, Way]]] = {
    "1.3": (
        "opensora_plan_v1_3",
        "tiny_i2v",
        [("a cat", True), ("a dog", False)],
        {"ulysses x guidance": Way({"ulysses": 2, "guidance": 2}, [[1, 1, 1, 1]] * 4)},
    ),
    "1.5": (
        "opensora_plan_v1_5",
        "tiny",
        [("a cat", False), ("a dog", False), ("birds", False)],
        {
            "tensor x guidance": Way({"tensor": 2, "guidance": 2}, [[1] * 6] * 4, 0.8),
            "groups, sharded": Way({"ulysses": 2, "skiparse": "groups", "shard": True}, [[2] * 4] * 4, 0.3),
        },
    ),
    "2.0": (
        "opensora_v2",
        "tiny_i2v",
        [("a cat", True), ("a dog", False)],
        {
            "ring": Way({"ring": 2}, [[3, 3], [3, 3], [2, 2], [2, 2]]),
            "tensor, fused weights": Way({"tensor": 2}, [[3, 3], [3, 3], [2, 2], [2, 2]], 0.8),
            "guidance": Way({"guidance": 2}, [[2, 2], [1, 1], [1, 1], [1, 1]]),
        },
    ),
    "CogVideoX": (
        "cogvideox",
        "tiny-5b",
        [("a cat", False), ("a dog", False), ("birds", False)],
        {
            "prompts": Way({}, [[2, 2], [2, 2], [2, 2], []]),
            "sharded, on the host": Way({"shard": True, "offload": True}, [[2, 2]] * 4, 0.3),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_videos_are_those_of_one_process(
    pool: Pool, folder_of: Callable[..., str], image: str, tmp_path: Path, case: str
) -> None:
    system, preset, prompts, ways = CASES[case]
    given = [(prompt, [image] if shown else []) for prompt, shown in prompts]
    spreads = {name: way.spread for name, way in ways.items()}
    arguments = {"model": folder_of(system, preset), "folder": str(tmp_path), "prompts": given, "spreads": spreads}
    replies = pool.run("sampling_cases.compare", 4, settings=SMALL, **arguments)
    assert list(replies[0]) == list(ways)
    for name, found in replies[0].items():
        way = ways[name]
        assert found["latents"] < 1e-5 and found["frames"] < 1e-4, (name, found)
        assert found["same files"] and found["same results"], (name, found)
        assert found["predictions"] == way.predictions, name
        spread = Spread(**way.spread)
        ranks = spread.ulysses * spread.ring * spread.tensor
        assert max(found["tokens"]) <= found["all tokens"] * (1 if ranks == 1 else 0.7), name
        shares_of_prompts = shard_sizes(len(prompts), 4 // spread.video)
        videos = [0 if spread.video == 1 else shares_of_prompts[rank // spread.video] for rank in range(4)]
        assert found["decoded together"] == videos, name
        shares = [weights[0] / found["all weights"] for weights in found["weights"] if weights]
        assert max(shares) <= way.weights, (name, shares)
        readers = [any("VAE" not in name and "KL" not in name for name in read) for read in found["read"]]
        assert readers == (
            [True, False, False, False] if way.weights < 1 else [bool(calls) for calls in way.predictions]
        )
        assert all(
            bool(count) == (rank % spread.video == 0 and bool(way.predictions[rank]))
            for rank, count in enumerate(found["captions"])
        )


def test_an_error_of_one_ends_all(pool: Pool, folder_of: Callable[..., str], tmp_path: Path) -> None:
    """The weights are shared, so that the others would wait for the process that has failed."""
    arguments = {"model": folder_of("opensora_plan_v1_5", "tiny"), "folder": str(tmp_path), "settings": SMALL}
    said = pool.run("sampling_cases.failing", 4, spread={"shard": True}, **arguments)
    assert all("velocity is not finite at step 1 of 2" in text for text in said), said
    assert all(text.startswith("FloatingPointError: ") for text in said)
    assert ["rank 2: " in text for text in said] == [True, True, False, True]
    said = pool.run("sampling_cases.unwritten", 4, **arguments)
    assert all("no space left" in text for text in said), said


def test_refusals(pool: Pool, folder_of: Callable[..., str], tmp_path: Path) -> None:
    """With the reason and what fits, before any weight is read."""
    arguments = {"model": folder_of("opensora_plan_v1_5", "tiny"), "folder": str(tmp_path)}
    for changes, sizes, words in (
        (
            {"guidance": 1.0},
            {"guidance": 2},
            "guidance-parallel must be at most 1, as a step of these videos needs one",
        ),
        ({}, {"tensor": 4}, "tensor must divide the 2 heads of SparseUMMDiT, got 4; nearest: 2"),
        ({}, {"ring": 2, "skiparse": "groups"}, "skiparse='groups' cannot go with ring=2; use ulysses"),
    ):
        said = pool.run("sampling_cases.refused", 4, settings={**SMALL, **changes}, spread=sizes, **arguments)
        assert all(text.startswith("sample: ") and words in text for text in said), said
    for sizes, words in (
        ({"ulysses": 3}, "sample: ulysses 3 needs a multiple of 3 processes, got 4; nearest: 3"),
        ({"ring": 0}, "sample: ring must be positive, got 0"),
        ({"offload": True}, "sample: offload must go with shard, got shard=False"),
    ):
        with pytest.raises(ValueError, match=words):
            Spread(**sizes).parallel(4)


class Pair:
    """A guidance group of two, of which this is the first."""

    guidance, spread, failed = object(), Spread(guidance=2), False


def test_arguments_without_the_batch_in_front_are_refused() -> None:
    transformer = Transformer(torch.nn.Module(), Pair(), shared=("ids",))  # type: ignore[arg-type]
    assert transformer._part("ids", torch.zeros(7, 3), 2, 0, 1).shape == (7, 3)
    assert transformer._part("scale", 4.0, 2, 0, 1) == 4.0
    assert transformer._part("x", torch.zeros(2, 3), 2, 1, 1).shape == (1, 3)
    with pytest.raises(ValueError, match=r"guidance: argument mask must have the batch 2 in front, got \(1, 5\)"):
        transformer._part("mask", torch.zeros(1, 5), 2, 0, 1)
