# SPDX-License-Identifier: Apache-2.0
"""What the trainer does when something happens on one process of several; numbers are test_combinations' affair."""

import json
from pathlib import Path
from typing import Any

import pytest

from vidgen.train.metrics import read_metrics

from .pool import Pool

pytest.importorskip("av")

from tests.train.conftest import parts  # noqa: F401  (a fixture)


@pytest.fixture
def values(parts: Path, tmp_path: Path) -> dict[str, Any]:  # noqa: F811
    return {
        "task": "vae",
        "output": str(tmp_path / "run"),
        "model": {"preset": "tiny"},
        "data": {"path": str(parts / "clips.jsonl"), "num_frames": 9, "height": 16, "width": 32},
        "training": {"steps": 2, "checkpoint_every": 100, "precision": "fp32", "log_every": 100},
        "optimizer": {"lr": 1e-3, "eps": 1e-3, "ema_decay": 0.9},
        "clipping": {"method": "norm"},
        "seed": 5,
        "device": "cpu",
    }


@pytest.mark.slow  # half a minute
def test_vae_equals_one_process(pool: Pool, values: dict[str, Any]) -> None:
    (found, *_) = pool.run("trainer_cases.compare", 4, values=values, parallel={"replicate": 2})
    assert found.pop("steps") == 2
    assert found.pop("statistics") < 1e-5
    assert found.pop("loss") < 1e-3  # of losses near a thousand
    assert max(found.values()) < 1e-5, found


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(pool: Pool, values: dict[str, Any]) -> None:
    results = pool.run("trainer_cases.spoiled", 4, values=values, rank=3, steps=[1])
    assert [each["skipped"] for each in results] == [1] * 4
    output = Path(values["output"])
    records = read_metrics(output / "metrics.jsonl")
    assert ["skipped" in record for record in records] == [True, False]
    folder = output / "skipped" / "step_00000001"
    assert {path.name for path in folder.glob("batch*")} == {f"batch.{rank}.safetensors" for rank in range(4)}
    facts = json.loads((folder / "step.json").read_text())
    assert len(facts["batches"]) == 4 and facts["reason"] == "the loss is not finite"
    assert len(facts["not_finite"]) > 10
    assert results[0]["replayed"] == pytest.approx(results[0]["loss without the fault"], rel=1e-5)


def test_three_in_a_row_stop_all(pool: Pool, values: dict[str, Any]) -> None:
    values["training"]["steps"] = 5
    results = pool.run("trainer_cases.spoiled", 4, values=values, rank=1, steps=[1, 2, 3])
    assert all(each["error"] == "TrainingStopped" and "3 steps in a row" in each["text"] for each in results)


def test_sigterm_on_one_rank_ends_all_and_the_run_goes_on(pool: Pool, values: dict[str, Any]) -> None:
    values["training"]["steps"] = 3
    for each in pool.run("trainer_cases.terminated", 4, values=values, rank=2, step=1):
        assert each == {"finished": False, "step": 1, "then": True, "same": True}


def test_errors_are_raised_on_all_ranks(pool: Pool, values: dict[str, Any]) -> None:
    for rank, (kind, text) in enumerate(pool.run("trainer_cases.locked", 4, values=values)):
        assert kind == "LockError" and "in use by process" in text and text.startswith("rank 0: ") == (rank > 0)
    for kind, text in pool.run("trainer_cases.different_recipes", 4, values=values):
        assert kind == "ValueError" and "the same on all processes" in text
    for kind, text in pool.run("trainer_cases.wrong_sizes", 4, values=values):
        assert kind == "ValueError" and "set shard=" in text


def test_broken_clips_of_all_ranks_are_in_the_report(
    pool: Pool,
    values: dict[str, Any],
    parts: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    good, broken = parts / "man.mp4", tmp_path / "cut_off.mp4"
    broken.write_bytes(good.read_bytes()[:3000])
    lines = [{"path": str(path), "caption": "a man"} for path in (broken, good, good, good)]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values["data"]["path"], values["training"]["steps"] = str(tmp_path / "clips.jsonl"), 1
    for listed in pool.run("trainer_cases.broken", 4, values=values):
        assert [Path(path).name for path in listed] == ["cut_off.mp4"]


def test_adapters(pool: Pool, parts: Path, values: dict[str, Any]) -> None:  # noqa: F811
    values |= {
        "task": "dit",
        "vae": str(parts / "vae"),
        "text": {"t5": str(parts / "text" / "t5"), "clip": str(parts / "text" / "clip"), "t5_max_length": 16},
        "lora": {"rank": 2, "alpha": 4.0, "target_modules": ["to_q", "to_out.0"]},
    }
    pytest.importorskip("peft")
    (found, *_) = pool.run("trainer_cases.adapters", 4, values=values)
    assert found.pop("frozen") and found.pop("only adapters have state")
    assert max(found.values()) < 1e-5, found
