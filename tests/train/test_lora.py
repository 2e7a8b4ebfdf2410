# SPDX-License-Identifier: Apache-2.0
"""Adapters: only they are trained, and their files are those of peft."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
pytest.importorskip("av")
pytest.importorskip("matplotlib")

from vidgen.checkpoints.convert import convert  # noqa: E402
from vidgen.config import ConfigError  # noqa: E402
from vidgen.data.video import open_video  # noqa: E402
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT, preset  # noqa: E402
from vidgen.pipelines.adapters import load_transformer  # noqa: E402
from vidgen.pipelines.folders import find_parts  # noqa: E402
from vidgen.pipelines.text_to_video import SampleSettings, sample_videos  # noqa: E402
from vidgen.train import loop  # noqa: E402
from vidgen.train.loop import train  # noqa: E402
from vidgen.train.lora import Lora, add_adapters  # noqa: E402
from vidgen.train.metrics import read_metrics  # noqa: E402

ADAPTERS = "adapter_model.safetensors"
LORA = {"rank": 3, "alpha": 6.0, "target_modules": ["to_q", "to_v", "proj_out"]}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model none of whose weights is zero, so that every adapter matters."""
    folder = tmp_path_factory.mktemp("base")
    model = SparseUMMDiT(preset("tiny", in_channels=4, out_channels=4, caption_channels=20, pooled_projection_dim=12))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_of(make_recipe, base):
    def make(**changes: Any) -> Any:
        training = {"steps": 2, **changes.pop("training", {})}
        values = {"model": {"pretrained": str(base)}, "training": training, "lora": LORA, "optimizer": {"lr": 0.01}}
        return make_recipe("dit", **{**values, **changes})

    return make


def test_only_adapters_are_trained(recipe_of, base, monkeypatch):
    runs = []
    original = loop._Run.train
    monkeypatch.setattr(loop._Run, "train", lambda run, *rest: runs.append(run) or original(run, *rest))
    recipe = recipe_of()
    train(recipe)
    (run,) = runs
    before = SparseUMMDiT.from_pretrained(base).state_dict()
    frozen = {n: p for n, p in run.task.model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(before)
    for name, p in frozen.items():
        assert torch.equal(p, before[name.replace(".base_layer", "")]), name
    assert all("lora_" in name for name, p in run.task.model.named_parameters() if p.requires_grad)
    assert len(run.optimizer.state) == len(run.parameters) > 20
    for state in run.optimizer.state.values():
        assert state["exp_avg"].abs().sum() > 0  # every adapter has had a gradient
    assert {path.name for path in (recipe.output / "step_00000002" / "ema").iterdir()} == {
        ADAPTERS,
        "adapter_config.json",
    }


def outputs(model: torch.nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    arguments = [(1, 4, 2, 4, 4), (1, 12), (1, 5, 20)]
    latent, pooled, text = (torch.randn(shape, generator=g) for shape in arguments)
    with torch.no_grad():
        return model(latent, torch.tensor([300.0]), pooled_projections=pooled, encoder_hidden_states=text)


def test_files_are_read_by_peft_and_merged_by_convert(recipe_of, base, tmp_path, monkeypatch):
    runs = []
    original = loop._Run.train
    monkeypatch.setattr(loop._Run, "train", lambda run, *rest: runs.append(run) or original(run, *rest))
    recipe = recipe_of()
    train(recipe)
    folder = recipe.output / "step_00000002" / "model"
    trained = outputs(runs[0].task.model.eval())
    plain = SparseUMMDiT.from_pretrained(base)
    assert (outputs(plain) - trained).abs().max() > 1e-3
    wrapped = peft.PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(outputs(wrapped.base_model.model), trained, atol=1e-6, rtol=1e-5)
    convert(base, tmp_path / "merged", "hf", lora=folder)
    merged = SparseUMMDiT.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), trained, atol=1e-5, rtol=1e-4)


def test_sampling_adds_the_adapters(recipe_of, base, tmp_path):
    """To the model that they were trained beside, or to one that is named: as if they had been merged."""
    recipe = recipe_of(optimizer={"lr": 0.1})
    train(recipe)
    folder = recipe.output / "step_00000002" / "ema"
    convert(base, tmp_path / "merged", "hf", lora=folder)
    settings = SampleSettings(steps=2, frames=9, height=16, width=16, device="cpu", guidance=1.5, precision="bf16")
    parts = {"vae": recipe.vae, "t5": recipe.text.t5, "clip": recipe.text.clip}

    def video(model: Path, **changes: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        (facts,) = sample_videos(model, ["a cat"], output, replace(settings, **changes))
        with open_video(facts["video"]) as reader:
            return reader.frames(range(9)), facts

    merged, _ = video(tmp_path / "merged", **parts)
    for lora in (folder, recipe.output):
        assert torch.equal(video(base, lora=lora, **parts)[0], merged)
    assert not torch.equal(video(base, **parts)[0], merged)
    _, facts = video(recipe.output)
    assert (facts["model"], facts["lora"]) == (str(base), str(folder))
    merged_model = SparseUMMDiT.from_pretrained(tmp_path / "merged")
    ours = load_transformer(SparseUMMDiT, find_parts(recipe.output), torch.float32, torch.device("cpu"))
    for name, weight in merged_model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_adapters_that_cannot_be_added(recipe_of, base, tmp_path):
    with pytest.raises(ValueError, match=r"lora: .*: no adapter_config.json there, and no run"):
        find_parts(base, vae=tmp_path, t5=tmp_path, clip=tmp_path, lora=tmp_path)
    train(recipe_of(training={"steps": 1}))
    parts = find_parts(tmp_path / "run")
    assert parts.lora is not None
    other = SparseUMMDiT(preset("tiny", num_heads=1, in_channels=4, out_channels=4, caption_channels=20))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="do not fit the base"):
        load_transformer(
            SparseUMMDiT, replace(parts, transformer=tmp_path / "other"), torch.float32, torch.device("cpu")
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_run_is_the_uninterrupted_one(recipe_of, tmp_path, dropout):
    lora = {**LORA, "dropout": dropout}
    train(recipe_of(output=tmp_path / "whole", lora=lora))
    train(recipe_of(training={"steps": 1}, lora=lora))
    torch.manual_seed(99)
    train(recipe_of(lora=lora))
    whole, resumed = ([r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("whole", "run"))
    assert whole == resumed
    for part in ("model", "ema"):
        a, b = (load_file(tmp_path / n / "step_00000002" / part / ADAPTERS) for n in ("whole", "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="lora.alpha 6.0 is now 7.0"):
        train(recipe_of(lora={**lora, "alpha": 7.0}))


def test_bad_sections_are_refused(recipe_of):
    with pytest.raises(ConfigError) as caught:
        recipe_of(lora={"rank": 0, "alpha": -1, "dropout": 1.0})
    text = str(caught.value)
    for name in ("rank must be positive, got 0", "alpha must be positive", "dropout must lie", "target_modules must"):
        assert name in text
    with pytest.raises(ConfigError, match="not cut over tensor ranks, got parallel.tensor=2; nearest: tensor=1"):
        recipe_of(parallel={"tensor": 2})
    model = SparseUMMDiT(preset("tiny"))
    with pytest.raises(ValueError, match="ends of names of linear layers .*to_q.*, got 'to_x'"):
        add_adapters(model, Lora(target_modules=["to_x"]))
