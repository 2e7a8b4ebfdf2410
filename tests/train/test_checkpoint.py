# SPDX-License-Identifier: Apache-2.0
import random

import pytest
import torch

from vidgen.io import newest_valid, verify_manifest
from vidgen.train import checkpoint
from vidgen.train.optimizer import EMAAdamW


def fill(text):
    return lambda folder: (folder / "part").write_text(text)


def test_a_failed_save_leaves_the_older_ones(tmp_path):
    checkpoint.save_checkpoint(tmp_path, 1, fill("one"), keep=1)

    def failing(folder):
        (folder / "part").write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save_checkpoint(tmp_path, 2, failing, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoint.save_checkpoint(tmp_path, 1, fill("one"), keep=3)
    (tmp_path / "step_00000001" / "part").write_text("bad")
    checkpoint.save_checkpoint(tmp_path, 1, fill("again"), keep=3)
    assert (tmp_path / "step_00000001" / "part").read_text() == "again"
    assert verify_manifest(tmp_path / "step_00000001") == []
    assert len(list(tmp_path.iterdir())) == 1


def test_failing_to_replace_keeps_what_was_there(tmp_path, monkeypatch):
    checkpoint.save_checkpoint(tmp_path, 1, fill("one"), keep=3)
    monkeypatch.setattr(checkpoint, "commit_directory", lambda *args: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        checkpoint.save_checkpoint(tmp_path, 1, fill("again"), keep=3)
    assert (tmp_path / "step_00000001" / "part").read_text() == "one"


def test_unfinished_ones_are_cleared_away(tmp_path):
    (tmp_path / "step_00000007.tmp").mkdir()
    (tmp_path / "notes.tmp").mkdir()
    checkpoint.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def test_keeping_counts_the_new_one_and_spares_later_ones(tmp_path):
    for step in (1, 2, 3, 9):
        checkpoint.save_checkpoint(tmp_path, step, fill("x"), keep=9)
    checkpoint.save_checkpoint(tmp_path, 4, fill("x"), keep=2)
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["3", "4", "9"]
    assert newest_valid(tmp_path).name == "step_00000009"


def test_auto_refuses_to_begin_over_damaged_checkpoints(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path, "auto") is None
    checkpoint.save_checkpoint(tmp_path, 1, fill("one"), keep=1)
    (tmp_path / "step_00000001" / "part").write_text("bad")
    with pytest.raises(ValueError, match="no checkpoint verifies"):
        checkpoint.find_checkpoint(tmp_path, "auto")


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_is_exact(tmp_path, dtype):
    pytest.importorskip("safetensors")
    runs = []
    for interrupted in (False, True):
        params = parameters(dtype)
        optimizer = EMAAdamW(params, 0.1, ema_decay=0.9)
        for step in range(6):
            if interrupted and step == 3:
                checkpoint.save_optimizer(optimizer, tmp_path)
                optimizer = EMAAdamW(params, 0.5, ema_decay=0.9)
                checkpoint.load_optimizer(optimizer, tmp_path)
            for p in params:
                p.grad = torch.sin(p.detach() * (step + 1))
            optimizer.step()
        runs.append([*params, *optimizer.ema_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_optimizer_of_another_model_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    optimizer = EMAAdamW(parameters(torch.float32), 0.1)
    checkpoint.save_optimizer(optimizer, tmp_path)
    with pytest.raises(ValueError, match="not those of this model"):
        checkpoint.load_optimizer(EMAAdamW(parameters(torch.float32)[:1], 0.1), tmp_path)


def test_random_generators_continue(tmp_path):
    pytest.importorskip("safetensors")
    random.seed(3)
    torch.manual_seed(3)
    random.gauss(0, 1)  # leaves a second number waiting
    checkpoint.save_state(tmp_path, {"step": 4}, torch.device("cpu"))
    wanted = random.gauss(0, 1), random.random(), torch.rand(3)
    random.seed(99)
    torch.manual_seed(99)
    assert checkpoint.load_state(tmp_path, torch.device("cpu")) == {"step": 4}
    got = random.gauss(0, 1), random.random(), torch.rand(3)
    assert got[:2] == wanted[:2] and torch.equal(got[2], wanted[2])


def test_a_run_that_is_started_again_goes_on_from_its_own_checkpoint(tmp_path):
    assert checkpoint.resume_after(tmp_path, "other/step_00000002", 1) == "other/step_00000002"
    checkpoint.save_checkpoint(tmp_path, 1, fill("one"), keep=1)
    for resume in ("none", "other/step_00000002", "auto"):
        assert checkpoint.resume_after(tmp_path, resume, 0) == resume
        assert checkpoint.resume_after(tmp_path, resume, 1) == "auto"
