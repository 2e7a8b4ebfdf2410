# SPDX-License-Identifier: Apache-2.0
"""Whole runs: they learn, and going on after any kind of end is the same as never having ended."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vidgen import config
from vidgen.io import LockError, lock_directory, newest_valid, read_json
from vidgen.train import checkpoint, loop
from vidgen.train.errors import TrainingStopped
from vidgen.train.loop import train
from vidgen.train.metrics import read_metrics
from vidgen.train.recipe import Optimizer
from vidgen.train.skipped import replay
from vidgen.train.steps import learning_rate, step_seed
from vidgen.train.tasks import DiTTask, VAETask

ROOT = Path(__file__).parents[2]
FILES = (
    "model/diffusion_pytorch_model.safetensors",
    "ema/diffusion_pytorch_model.safetensors",
    "optimizer.safetensors",
)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def assert_same_checkpoint(first: Path, second: Path, names=FILES) -> None:
    for name in names:
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert not different, (name, different[:5])


class Killed(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Call ``action`` when the loop is about to take this step."""
    original = loop._Run._step

    def interrupted(run):
        if run.step + 1 == step:
            action()
        return original(run)

    monkeypatch.setattr(loop._Run, "_step", interrupted)


def kill() -> None:
    raise Killed


# Learning


def test_vae_run_writes_everything_and_learns(make_recipe, parts):
    recipe = make_recipe(
        data={"path": parts / "one.jsonl"}, training={"steps": 40}, optimizer={"lr": 5e-3, "schedule": "cosine"}
    )
    report = train(recipe)
    values = losses(recipe.output)
    assert len(values) == 40 and all(math.isfinite(value) for value in values)
    assert sum(values[-4:]) < 0.7 * sum(values[:4])
    assert report == read_json(recipe.output / "report.json")
    assert report["finished"] and report["skipped_steps"] == 0 and report["broken_clips"] == []
    assert report["loss_last"] < report["loss_first"]
    record = read_metrics(recipe.output / "metrics.jsonl")[-1]
    for name in ("step", "loss", "reconstruction", "kl", "wavelet", "grad_norm", "samples_per_s", "peak_memory_bytes"):
        assert record[name] > 0, name
    assert (recipe.output / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert config.to_dict(config.load(type(recipe), recipe.output / "config.yaml")) == config.to_dict(recipe)


def test_vae_run_ends_with_the_statistics_of_its_latents(make_recipe):
    recipe = make_recipe()
    train(recipe)
    from vidgen.models.autoencoders import WFVAE

    folder = newest_valid(recipe.output)
    vae = WFVAE.from_pretrained(folder / "ema")
    task = VAETask(recipe, torch.device("cpu"), folder / "ema")
    video = torch.stack([task.dataset[i]["video"] for i in range(3)])
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat([vae.encode(video, generator=generator) for _ in range(20)])
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), atol=0.1, rtol=0)


@pytest.mark.parametrize("cached", [False, True])
def test_dit_learns_one_clip(make_recipe, parts, tmp_path, cached):
    recipe = make_recipe(
        "dit",
        data={"path": parts / "one.jsonl", "cache": tmp_path / "cache" if cached else None},
        training={"steps": 60 if cached else 4, "batch_size": 4, "checkpoint_every": 100},
        optimizer={"lr": 5e-3},
    )
    report = train(recipe)
    values = losses(recipe.output)
    assert all(math.isfinite(value) for value in values)
    if cached:
        assert sum(values[-10:]) < 0.8 * sum(values[:10])
        assert report["cache"] == {"hits": 0, "misses": 3}  # one clip, its caption, and the empty one


# Going on


CASES = {
    "vae": ("vae", {}),
    "vae, accumulation": ("vae", {"training": {"accumulation": 2}}),
    "vae, data worker": ("vae", {"data": {"num_workers": 1}}),
    "dit, bf16": ("dit", {"training": {"precision": "bf16", "batch_size": 2}, "clipping": {"method": "adaptive"}}),
    "dit, checkpointing": ("dit", {"training": {"activation_checkpointing": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_the_uninterrupted_one(make_recipe, tmp_path, monkeypatch, case):
    task, changes = CASES[case]
    whole = make_recipe(task, output=tmp_path / "whole", **changes)
    train(whole)
    broken = make_recipe(task, output=tmp_path / "broken", **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, kill)
        with pytest.raises(Killed):
            train(broken)
    assert len(losses(broken.output)) == 4  # one step more than its checkpoint has
    torch.manual_seed(99)
    train(broken)
    assert losses(broken.output) == losses(whole.output)
    assert_same_checkpoint(whole.output / "step_00000006", broken.output / "step_00000006")


def test_accumulated_batches_are_one_batch(make_recipe, tmp_path, monkeypatch):
    """Gradients of two micro-batches add up to those of the batch, apart from their draws of noise."""
    noiseless = lambda *shape, generator=None: torch.zeros(shape[0])  # noqa: E731
    monkeypatch.setattr("vidgen.train.tasks.torch.randn", noiseless)
    one = make_recipe(output=tmp_path / "one", training={"steps": 2, "batch_size": 2})
    two = make_recipe(output=tmp_path / "two", training={"steps": 2, "accumulation": 2})
    train(one)
    train(two)
    assert losses(one.output) == pytest.approx(losses(two.output), rel=1e-5)


def test_kill_in_the_middle_of_a_save(make_recipe, tmp_path):
    whole = make_recipe(output=tmp_path / "whole")
    train(whole)
    recipe = make_recipe()
    config.save(recipe, tmp_path / "recipe.yaml")
    program = textwrap.dedent("""
        import os, signal, sys
        from vidgen.train import checkpoint
        from vidgen.train.loop import train
        from vidgen.train.recipe import load_recipe

        commit, saves = checkpoint.commit_directory, []
        def dying(temporary, final, *known):
            saves.append(final)
            if len(saves) == 2:
                (temporary / "optimizer.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            commit(temporary, final, *known)
        checkpoint.commit_directory = dying
        train(load_recipe(sys.argv[1]))
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", program, str(tmp_path / "recipe.yaml")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (recipe.output / "step_00000006.tmp").is_dir()
    assert newest_valid(recipe.output).name == "step_00000003"
    train(recipe)
    assert not list(recipe.output.glob("*.tmp"))
    assert losses(recipe.output) == losses(whole.output)
    assert_same_checkpoint(whole.output / "step_00000006", recipe.output / "step_00000006")


def test_sigterm_saves_and_ends_well(make_recipe, tmp_path, monkeypatch):
    recipe, whole = make_recipe(), make_recipe(output=tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        report = train(recipe)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not report["finished"] and report["step"] == 2
    assert newest_valid(recipe.output).name == "step_00000002"
    train(recipe)
    train(whole)
    assert losses(recipe.output) == losses(whole.output)


def test_a_finished_run_is_left_alone(make_recipe):
    recipe = make_recipe()
    train(recipe)
    newest = recipe.output / "step_00000006" / "manifest.json"
    before = newest.stat().st_mtime_ns
    assert train(recipe)["finished"]
    assert newest.stat().st_mtime_ns == before
    assert len(losses(recipe.output)) == 6


def test_resume_none_refuses_a_folder_with_a_run(make_recipe):
    recipe = make_recipe()
    train(recipe, resume="none")
    with pytest.raises(ValueError, match="holds a run already"):
        train(recipe, resume="none")


def test_resume_from_a_path(make_recipe, tmp_path):
    first = make_recipe()
    train(first)
    second = make_recipe(output=tmp_path / "second")
    train(second, resume=str(first.output / "step_00000003"))
    assert_same_checkpoint(first.output / "step_00000006", second.output / "step_00000006")
    with pytest.raises(ValueError, match="manifest"):
        train(second, resume=str(tmp_path / "nowhere"))


def test_resume_refuses_another_model_and_tells_other_changes(make_recipe, caplog):
    train(make_recipe())
    with pytest.raises(ValueError, match="model.latent_dim None is now 6"):
        train(make_recipe(model={"preset": "tiny", "latent_dim": 6}))
    with pytest.raises(ValueError, match="training.precision 'fp32' is now 'bf16'"):
        train(make_recipe(training={"precision": "bf16"}))
    train(make_recipe(optimizer={"lr": 1e-4}, training={"steps": 7}))
    assert "optimizer.lr 0.001 is now 0.0001" in caplog.text and "steps" not in caplog.text


def test_training_goes_on_from_a_pretrained_run(make_recipe, tmp_path):
    first = make_recipe()
    train(first)
    model = {"pretrained": str(first.output)}
    second = make_recipe(output=tmp_path / "second", model=model, training={"steps": 1})
    train(second)
    assert losses(second.output)[0] < losses(first.output)[0]


def test_damaged_newest_checkpoint_is_passed_over(make_recipe, tmp_path, caplog):
    recipe = make_recipe()
    train(recipe)
    whole = losses(recipe.output)
    file = recipe.output / "step_00000006" / "model" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train(recipe)
    assert "passed over" in caplog.text
    assert losses(recipe.output) == whole
    assert newest_valid(recipe.output).name == "step_00000006"


def test_only_the_newest_checkpoints_are_kept(make_recipe):
    recipe = make_recipe(training={"checkpoint_every": 1, "keep_checkpoints": 2})
    train(recipe)
    assert [path.name for path in checkpoint.checkpoints(recipe.output)] == ["step_00000005", "step_00000006"]


def test_two_runs_do_not_share_an_output(make_recipe):
    recipe = make_recipe()
    with lock_directory(recipe.output), pytest.raises(LockError, match="in use by process"):
        train(recipe)


# What is not finite


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps NaN."""
    original, count = VAETask.loss, iter(range(1, 1000))

    def loss(task, batch, generator):
        value, terms = original(task, batch, generator)
        return (value * float("nan") if next(count) in steps else value), terms

    monkeypatch.setattr(VAETask, "loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_kept(make_recipe, monkeypatch):
    recipe = make_recipe(training={"checkpoint_every": 1, "keep_checkpoints": 9})
    with monkeypatch.context() as patch:
        spoil(patch, 2)
        report = train(recipe)
    assert report["skipped_steps"] == 1
    records = read_metrics(recipe.output / "metrics.jsonl")
    assert records[1]["loss"] is None and "not finite" in records[1]["skipped"]
    assert [record["step"] for record in records if "skipped" in record] == [2]
    assert not (recipe.output / "step_00000002").exists()  # no checkpoint while a step is in doubt
    dump = recipe.output / "skipped" / "step_00000002"
    step_1 = load_file(recipe.output / "step_00000001" / FILES[0])
    assert_same_checkpoint(recipe.output / "step_00000001", dump, FILES[:1])
    assert all(torch.isfinite(value).all() for value in step_1.values())
    facts = read_json(dump / "step.json")
    assert facts["loss"] == "nan" and facts["not_finite"]
    again = replay(recipe, dump)  # without the spoiled loss the step is fine
    assert again["not_finite"] == [] and math.isfinite(float(again["loss"]))


def test_replay_repeats_the_draws(make_recipe, monkeypatch):
    recipe = make_recipe(training={"accumulation": 2})
    train(recipe)
    clean = losses(recipe.output)
    other = make_recipe(output=recipe.output.with_name("other"), training={"accumulation": 2})
    with monkeypatch.context() as patch:
        spoil(patch, 3)  # the first micro-batch of step 2
        train(other)
    assert float(replay(other, other.output / "skipped" / "step_00000002")["loss"]) == clean[1]


def test_three_in_a_row_stop_the_run(make_recipe, monkeypatch):
    recipe = make_recipe(training={"checkpoint_every": 1, "steps": 9})
    spoil(monkeypatch, 2, 4, 5, 6)
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        train(recipe)
    assert newest_valid(recipe.output).name == "step_00000003"
    for value in load_file(recipe.output / "step_00000003" / FILES[0]).values():
        assert torch.isfinite(value).all()
    report = read_json(recipe.output / "report.json")
    assert not report["finished"] and report["skipped_steps"] == 4


def test_weights_that_are_not_finite_are_never_saved(make_recipe, monkeypatch):
    recipe = make_recipe()
    original = loop.EMAAdamW.step

    def step(optimizer):
        original(optimizer)
        optimizer.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(loop.EMAAdamW, "step", step)
    monkeypatch.setattr(VAETask, "loss", lambda self, batch, generator: (next(self.model.parameters())[1:].sum(), {}))
    with pytest.raises(TrainingStopped, match="weights are not finite"):
        train(recipe)
    assert newest_valid(recipe.output) is None


# Disks


def test_failed_saves_are_survived_up_to_three(make_recipe, monkeypatch, capsys):
    original = checkpoint.save_optimizer
    full = iter([False, True, True, False, True, True, True])

    def save(optimizer, folder):
        if next(full):
            raise OSError(28, "No space left on device")
        original(optimizer, folder)

    monkeypatch.setattr(checkpoint, "save_optimizer", save)
    recipe = make_recipe(training={"checkpoint_every": 1, "steps": 9})
    with pytest.raises(TrainingStopped, match="3 checkpoints in a row failed.*No space"):
        train(recipe)
    assert [path.name for path in checkpoint.checkpoints(recipe.output)] == ["step_00000001", "step_00000004"]
    assert not list(recipe.output.glob("*.tmp"))
    assert "checkpoint at step 2 failed and was removed" in capsys.readouterr().out


# Clips


@pytest.mark.parametrize("cached", [False, True])
def test_broken_clips_are_listed(make_recipe, parts, tmp_path, cached):
    good = parts / "man.mp4"
    (tmp_path / "cut_off.mp4").write_bytes(good.read_bytes()[:3000])
    names = ["cut_off.mp4", str(good)]
    lines = [f'{{"path": "{name}", "caption": "a man"}}\n' for name in names]
    (tmp_path / "clips.jsonl").write_text("".join(lines))
    changes = {"path": tmp_path / "clips.jsonl", "cache": tmp_path / "cache" if cached else None}
    recipe = make_recipe(data=changes)
    (broken,) = train(recipe)["broken_clips"]
    assert broken["path"].endswith("cut_off.mp4") and broken["reason"]
    assert read_json(recipe.output / "report.json")["broken_clips"] == [broken]


def test_too_many_broken_clips_stop_the_run(make_recipe, tmp_path, parts):
    lines = [f'{{"path": "no_{i}.mp4", "caption": "none"}}\n' for i in range(5)]
    lines.append(f'{{"path": "{parts / "man.mp4"}", "caption": "a man"}}\n')
    (tmp_path / "clips.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="clips cannot be used"):
        train(make_recipe(data={"path": tmp_path / "clips.jsonl"}))


# Captions and caches


def test_dropped_captions_are_empty_for_both_encoders(make_recipe, monkeypatch):
    def loss_of(dropout: float, caption: str) -> float:
        recipe = make_recipe("dit", text={"caption_dropout": dropout})
        task = DiTTask(recipe, torch.device("cpu"), None)
        torch.manual_seed(0)
        task.model.init_weights(torch.Generator().manual_seed(0))
        batch = {"video": torch.zeros(1, 3, 9, 16, 32), "caption": [caption]}
        return float(task.loss(batch, torch.Generator().manual_seed(1))[0].detach())

    assert loss_of(1.0, "a man") == loss_of(1.0, "a horse") == loss_of(0.0, "")
    assert loss_of(0.0, "a man") != loss_of(0.0, "a horse")


def test_cache_is_used_again_and_notices_another_vae(make_recipe, tmp_path, parts):
    changes = {"data": {"cache": tmp_path / "cache"}, "training": {"steps": 1}}
    first = train(make_recipe("dit", output=tmp_path / "a", **changes))
    second = train(make_recipe("dit", output=tmp_path / "b", **changes))
    assert first["cache"] == {"hits": 0, "misses": 7}  # three clips, three captions, the empty caption
    assert second["cache"] == {"hits": 7, "misses": 0}
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    from vidgen.models.autoencoders import WFVAE, preset

    WFVAE(preset("tiny")).save_pretrained(tmp_path / "vae")
    third = train(make_recipe("dit", output=tmp_path / "c", vae=tmp_path / "vae", **changes))
    assert third["cache"] == {"hits": 4, "misses": 3}


def test_cached_latents_are_those_of_the_vae(make_recipe, tmp_path):
    recipe = make_recipe("dit", data={"cache": tmp_path / "cache"})
    task = DiTTask(recipe, torch.device("cpu"), None)
    vae, video = task.vae, task.dataset[0]["video"][None]
    batch = task.features(video)
    latents = task._latents(batch, torch.Generator().manual_seed(3))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(latents, vae.encode(video, noise=noise), atol=1e-5, rtol=1e-5)


def test_widths_that_do_not_fit_are_named(make_recipe):
    recipe = make_recipe("dit", model={"preset": "tiny", "in_channels": 8, "caption_channels": 24})
    with pytest.raises(ValueError, match="in_channels must be 4.*caption_channels must be 20"):
        train(recipe)


# Numbers


def test_learning_rate():
    options = Optimizer(lr=1.0, warmup_steps=4, schedule="cosine", final_lr_fraction=0.1)
    rates = [learning_rate(options, step, 14) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert learning_rate(Optimizer(lr=3.0), 7, 8) == 3.0


def test_step_seeds_differ():
    seeds = {step_seed(seed, step, micro) for seed in range(3) for step in range(20) for micro in range(3)}
    assert len(seeds) == 180 and all(0 <= seed < 2**63 for seed in seeds)
