# SPDX-License-Identifier: Apache-2.0
"""Recipes: every file under configs/ parses, and what is wrong is said with its place."""

from pathlib import Path

import pytest

from vidgen.config import ConfigError
from vidgen.train.recipe import load_recipe, model_config
from vidgen.train.tasks import describe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"t2v_8b", "t2v_tiny", "wfvae_8x8x8", "wfvae_tiny"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_parses(path: Path) -> None:
    facts = describe(load_recipe(path))
    assert facts["parameters"] > 0


def test_released_sizes() -> None:
    folder = next(path.parent for path in CONFIGS if path.stem == "t2v_8b")
    facts = describe(load_recipe(folder / "t2v_8b.yaml"))
    assert facts["parameters"] == 8_504_661_120
    assert facts["latent_shape"] == [1, 32, 16, 72, 128] and facts["tokens"] == 36_864
    facts = describe(load_recipe(folder / "wfvae_8x8x8.yaml"))
    assert facts["parameters"] == 227_035_816 - 192  # the encoder's wavelet taps are not trained


def tiny(**changes):
    values = {
        "task": "vae",
        "output": "out",
        "model": {"preset": "tiny"},
        "data": {"path": "clips", "num_frames": 9, "height": 16, "width": 16},
        "training": {"steps": 1},
    }
    return {**values, **changes}


def test_preset_is_changed_by_fields() -> None:
    recipe = load_recipe(tiny(), ["--model.latent_dim", "6", "--model.scale", "[1, 2, 3, 4, 5, 6]"])
    config = model_config(recipe)
    assert config.latent_dim == 6 and config.base_channels == 4 and config.scale == (1, 2, 3, 4, 5, 6)


PROBLEMS = {
    "training.stepz": (["--training.stepz", "3"], "did you mean training.steps"),
    "model.latent_dims": (["--model.latent_dims", "3"], "model.latent_dims: unknown name, did you mean latent_dim"),
    "model.preset": (["--model.preset", "huge"], "model.preset: wanted one of released, small, tiny"),
    "loss": (["--loss.kl", "1"], "loss.kl"),
    "frames": (["--data.num_frames", "16"], "8n\\+1, got 16"),
    "size": (["--data.width", "20"], "multiples of 8"),
    "precision": (["--training.precision", "fp8"], "one of 'bf16', 'fp32'"),
    "ema": (["--optimizer.ema_decay", "1"], "ema_decay must lie in"),
    "betas": (["--optimizer.betas", "[0.9, 1.5]"], "betas must lie in"),
    "dit without parts": (["--task", "dit"], "text.t5: missing"),
    "negative": (["--training.keep_checkpoints", "0"], "keep_checkpoints must be positive"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_is_named(name: str) -> None:
    overrides, message = PROBLEMS[name]
    with pytest.raises(ConfigError, match=message):
        load_recipe(tiny(), overrides)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny(), ["--training.stepz", "3", "--data.fps", "fast", "--optimizer.lr", "-1"])
    assert len(caught.value.problems) == 3


def test_the_vae_has_the_only_loss_to_configure() -> None:
    dit = {"vae": "v", "text": {"t5": "a", "clip": "b"}}
    with pytest.raises(ConfigError, match="loss.kl_weight: only a vae"):
        load_recipe(tiny(task="dit", **dit), ["--loss.kl_weight", "1"])
