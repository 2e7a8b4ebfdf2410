# SPDX-License-Identifier: Apache-2.0
"""Encoders shared by the processes of a replica, and moved away between uses: counts, order, and unchanged results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("av", "safetensors", "transformers", "yaml", "matplotlib"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from vidgen.data.video import write_video  # noqa: E402
from vidgen.models import autoencoders  # noqa: E402
from vidgen.models.text import save_tiny_text_encoders  # noqa: E402
from vidgen.train import loop  # noqa: E402
from vidgen.train.metrics import read_metrics  # noqa: E402
from vidgen.train.recipe import load_recipe  # noqa: E402

from .pool import Pool  # noqa: E402

CAPTIONS = ("red squares", "noise", "a cat", "grey")
DROPPED = 2  # the empty caption, and the one that says nothing
STEPS = 2


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of the inpainting model: draws of masks, noise on what is given, and captions that are dropped."""
    folder = tmp_path_factory.mktemp("encoding")
    random = torch.Generator().manual_seed(0)
    records = []
    for number, caption in enumerate(CAPTIONS):
        frames = torch.randint(0, 256, (12, 4, 8, 3), generator=random, dtype=torch.uint8)
        write_video(folder / f"{number}.mp4", [frames.repeat_interleave(4, 1).repeat_interleave(4, 2)], 8.0)
        records.append({"path": f"{number}.mp4", "caption": caption})
    (folder / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    torch.manual_seed(0)
    autoencoders.WFVAE(autoencoders.preset("tiny_4x8x8")).save_pretrained(folder / "vae")
    save_tiny_text_encoders(folder / "text", t5_channels=20, clip_channels=12, multilingual=True)
    return {
        "task": "dit",
        "system": "opensora_plan_v1_3",
        "output": str(folder),
        "model": {"preset": "tiny_i2v"},
        "vae": str(folder / "vae"),
        "text": {"t5": str(folder / "text" / "t5"), "t5_max_length": 8, "caption_dropout": 0.4},
        "data": {"path": str(folder / "clips.jsonl"), "num_frames": 5, "height": 16, "width": 32},
        "training": {"steps": STEPS, "accumulation": 4, "checkpoint_every": 100, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "eps": 1e-3, "ema_decay": 0.9},
        "clipping": {"method": "norm"},
        "seed": 5,
        "device": "cpu:0",  # the same as "cpu", where encoders wait, but it has another name
    }


@pytest.fixture(scope="module")
def alone(values: dict[str, Any]) -> Path:
    """The run of one process, with the accumulation of two replicas."""
    output = Path(values["output"]) / "alone"
    loop.train(load_recipe({**values, "output": str(output), "training": {**values["training"], "accumulation": 8}}))
    return output


def assert_same(one: Path, other: Path, atol: float = 1e-6) -> None:
    losses = [[record["loss"] for record in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=atol)
    for part in ("model", "ema"):
        file = Path(f"step_{STEPS:08d}") / part / "diffusion_pytorch_model.safetensors"
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) <= atol


def assert_away(events: list[str], rounds: int) -> None:
    """While the transformer computes, the encoders are on the host; when they encode, on the device."""
    here = {"WFVAE": "cpu:0", "T5TextEncoder": "cpu:0"}
    moves = 0
    for event in events:
        module, moved, where = event.partition(" to ")
        if moved:
            here[module], moves = where, moves + 1
        else:
            assert set(here.values()) == {"cpu" if event == "loss" else "cpu:0"}, (event, here)
    assert moves == 4 * rounds  # both of them, to the device and back


@pytest.mark.parametrize("interval", [None, 3])
def test_ranks_of_a_replica_encode_different_samples(
    pool: Pool, values: dict[str, Any], alone: Path, interval: int | None
) -> None:
    """FSDP x Ulysses: two replicas of two processes."""
    output = Path(values["output"]) / f"divided {interval}"
    changes = {"output": str(output), "encoders": {"interval": interval}}
    for events in pool.run("encoding_cases.run", 4, values=values, changes=changes, ulysses=2):
        assert events.count("loss") == 8  # 2 steps of 4 micro-steps
        assert events.count("clip") == events.count("caption") == 4  # half of that
        if interval is None:
            assert not any(" to " in event for event in events)
        else:
            assert_away(events, rounds=2)  # of 3 * 2 micro-steps, and what is left
    assert_same(output, alone)


def test_resumed_run_without_encoder_data_parallelism(pool: Pool, values: dict[str, Any], alone: Path) -> None:
    output = Path(values["output"]) / "resumed"
    changes = {"output": str(output), "encoders": {"data_parallel": False, "interval": 3}}
    for events in pool.run("encoding_cases.resumed", 4, values=values, changes=changes, ulysses=2):
        assert events.count("loss") == events.count("clip") == 4
        assert_away(events, rounds=2)
    assert_same(output, alone)


def test_processes_fill_one_cache(pool: Pool, values: dict[str, Any]) -> None:
    """Each entry is computed once by one of them; what depends on draws is encoded as ever."""
    folder = Path(values["output"])
    one = {"output": str(folder / "cached alone"), "data": {**values["data"], "cache": str(folder / "cache alone")}}
    loop.train(load_recipe({**values, **one, "training": {**values["training"], "accumulation": 4}}))
    changes = {
        "output": str(folder / "cached"),
        "data": {"cache": str(folder / "cache")},
        "training": {"accumulation": 2},
    }
    replies = pool.run("encoding_cases.run", 4, values=values, changes=changes, ulysses=2)
    assert [events.count("clip") for events in replies] == [1, 1, 1, 1]
    assert sum(events.count("caption") for events in replies) == len(CAPTIONS) + DROPPED
    assert max(events.count("caption") for events in replies) == 2
    names = [sorted(path.name for path in (folder / name).iterdir()) for name in ("cache", "cache alone")]
    assert names[0] == names[1] and len(names[0]) == 2 * len(CAPTIONS) + DROPPED
    assert_same(folder / "cached", folder / "cached alone")


def test_an_error_of_one_ends_all(pool: Pool, values: dict[str, Any]) -> None:
    said = pool.run("encoding_cases.broken", 4, values=values)
    assert all(text.startswith("ValueError: ") and "this clip is bad" in text for text in said), said


def test_exchange_of_batches_that_differ(pool: Pool) -> None:
    assert all(pool.run("encoding_cases.exchanged", 4))


def test_pipeline_ranks_share_samples_too(pool: Pool) -> None:
    assert all(pool.run("encoding_cases.replicas", 4))


def test_interval_of_one_process_changes_no_bit(values: dict[str, Any], alone: Path) -> None:
    output = Path(values["output"]) / "interval"
    changes = {
        "output": str(output),
        "encoders": {"interval": 3},
        "training": {**values["training"], "accumulation": 8},
    }
    loop.train(load_recipe({**values, **changes}))
    assert_same(output, alone, atol=0)


def test_only_a_dit_has_encoders(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="encoders: only the training of a dit has encoders"):
        load_recipe({**values, "task": "vae", "model": {"preset": "tiny_4x8x8"}, "encoders": {"interval": 2}})
    with pytest.raises(ValueError, match="interval must be positive, got 0"):
        load_recipe({**values, "encoders": {"interval": 0}})
