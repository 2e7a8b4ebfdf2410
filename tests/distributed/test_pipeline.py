# SPDX-License-Identifier: Apache-2.0
"""Pipelines equal one process: losses, outputs and the gradients of all parameters."""

from __future__ import annotations

import json
import math
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
from vidgen.parallel import Parallel  # noqa: E402
from vidgen.parallel.pipeline_stages import micro_batch_problems, stage_problems  # noqa: E402
from vidgen.train import loop  # noqa: E402
from vidgen.train.metrics import read_metrics  # noqa: E402
from vidgen.train.recipe import load_recipe  # noqa: E402

from .pool import Pool  # noqa: E402

SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
UNEVEN = {2: {6: [4, 2], 4: [3, 1]}, 4: {6: [0, 3, 2, 1], 4: [1, 2, 1, 0]}}  # by stages and blocks
VIRTUAL = {6: [[1, 2], [2, 1]], 4: [[1, 1], [1, 1]]}
CASES: dict[str, dict[str, Any]] = {}
for _system in SYSTEMS:
    _blocks = 6 if _system == "opensora_plan_v1_5" else 4
    CASES |= {
        f"{_system}, 2 stages": {
            "system": _system,
            "parallel": {"pipeline": 2, "stages": UNEVEN[2][_blocks]},
            "frames": (2, 3, 2),
            "recompute": True,
        },
        f"{_system}, 4 stages": {
            "system": _system,
            "parallel": {"pipeline": 4, "stages": UNEVEN[4][_blocks], "schedule": "gpipe"},
        },
        f"{_system}, virtual stages": {
            "system": _system,
            "parallel": {"pipeline": 2, "stages": VIRTUAL[_blocks]},
            "recompute": True,
        },
    }
CASES |= {
    "even, as many micro-batches as rounds of 2": {
        "system": "opensora_plan_v1_3",
        "parallel": {"pipeline": 2},
        "micro_batches": 4,
    },
    "fewer micro-batches than stages": {"system": "opensora_v2", "parallel": {"pipeline": 4}, "micro_batches": 2},
    "pipeline x fsdp": {
        "system": "opensora_plan_v1_5",
        "parallel": {"pipeline": 2, "shard": 2},
        "fsdp": True,
        "frames": (2, 3, 2),
    },
    "virtual stages x fsdp": {
        "system": "opensora_v2",
        "parallel": {"pipeline": 2, "shard": 2, "stages": VIRTUAL[4]},
        "fsdp": True,
        "recompute": True,
    },
    "pipeline x replicas": {
        "system": "cogvideox",
        "parallel": {"pipeline": 2, "replicate": 2, "stages": [1, 3]},
        "fsdp": True,
        "frames": (2, 2),
    },
    "pipeline x ulysses": {
        "system": "opensora_v2",
        "parallel": {"pipeline": 2, "ulysses": 2, "stages": [1, 3]},
        "frames": (2, 3, 2),
        "recompute": True,
    },
    "pipeline x tensor, buffers of one bucket": {
        "system": "opensora_v2",
        "parallel": {"pipeline": 2, "tensor": 2, "stages": [3, 1]},
        "frames": (2, 3, 2),
        "buckets": 1,
    },
    "pipeline x ring x fsdp": {
        "system": "opensora_plan_v1_5",
        "parallel": {"pipeline": 2, "ring": 2},
        "fsdp": True,
    },
}


def check(pool: Pool, case: dict[str, Any]) -> None:
    parallel = case["parallel"]
    stages = parallel["pipeline"]
    width = math.prod(parallel.get(name, 1) for name in ("shard", "replicate", "ring", "ulysses", "tensor"))
    found = pool.run("pipeline_cases.steps", 4, members=stages * width, **case)[: stages * width]
    facts = [{name: errors.pop(name) for name in ("bytes", "names", "all")} for errors in found]
    for rank, errors in enumerate(found):
        assert len(errors) > 4
        for what, error in errors.items():
            assert error <= 1e-5, f"{what} on rank {rank}: {error}"
    # Each parameter is on one stage; each rank holds a part of the bytes.
    names = [name for rank in range(0, stages * width, width) for name in facts[rank]["names"]]
    assert sorted(names) == sorted(facts[0]["all"])
    assert all(facts[rank]["names"] == facts[rank // width * width]["names"] for rank in range(stages * width))
    assert all(0 < fact["bytes"] < 0.95 for fact in facts)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(pool: Pool, name: str) -> None:
    check(pool, CASES[name])


# Training

STEPS = 3


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of the inpainting model, whose loss draws masks and noise and asks the VAE too."""
    folder = tmp_path_factory.mktemp("pipeline")
    random = torch.Generator().manual_seed(0)
    records = []
    for number, caption in enumerate(("red squares", "noise", "a cat")):
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
        "model": {"preset": "tiny_i2v", "num_layers": 4},
        "vae": str(folder / "vae"),
        "text": {"t5": str(folder / "text" / "t5"), "t5_max_length": 8, "caption_dropout": 0.4},
        "data": {"path": str(folder / "clips.jsonl"), "num_frames": 5, "height": 16, "width": 32},
        "training": {"steps": STEPS, "accumulation": 3, "checkpoint_every": 100, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "eps": 1e-3, "ema_decay": 0.9},
        "clipping": {"method": "norm"},
        "seed": 5,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def alone(values: dict[str, Any]) -> Path:
    """The run of one process, with the micro-steps of two replicas."""
    output = Path(values["output"]) / "alone"
    report = loop.train(
        load_recipe({**values, "output": str(output), "training": {**values["training"], "accumulation": 6}})
    )
    assert report["finished"]
    return output


TRAINED = {
    "pipeline x fsdp, resumed": ({"pipeline": 2, "shard": 2, "stages": [1, 3]}, {"steps": 1}),
    "virtual stages x replicas": ({"pipeline": 2, "replicate": 2, "stages": [[1, 1], [1, 1]]}, {}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training(pool: Pool, values: dict[str, Any], alone: Path, name: str) -> None:
    """Losses, gradient norms, weights and their average are those of one process."""
    parallel, first = TRAINED[name]
    output = Path(values["output"]) / name
    reports = pool.run("pipeline_cases.train", 4, values=values, output=str(output), parallel=parallel, first=first)
    assert all(report == reports[0] for report in reports)
    for key in ("loss", "grad_norm"):
        wanted, got = ([record[key] for record in read_metrics(run / "metrics.jsonl")] for run in (alone, output))
        assert len(got) == STEPS and got == pytest.approx(wanted, rel=1e-5)
    assert reports[0]["parameters"] == json.loads((alone / "report.json").read_text())["parameters"]
    for part in ("model", "ema"):
        file = Path(f"step_{STEPS:08d}") / part / "diffusion_pytorch_model.safetensors"
        a, b = load_file(alone / file), load_file(output / file)
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6


# Refusals


@pytest.mark.parametrize(
    ("stages", "words", "near"),
    [
        ([11, 10, 11, 10], "add up to the model's 40 blocks, got 42", [10, 10, 10, 10]),
        ([3, 0, 20, 17], "give stage 1 a block", [3, 1, 19, 17]),
        ([[4, 4, 4, 4], [4, 4, 4, 4]], "add up to the model's 40 blocks, got 32", [[5, 5, 5, 5], [5, 5, 5, 5]]),
        ([20, 20], "have pipeline=4 numbers in each row", None),
    ],
)
def test_stages_that_do_not_fit(stages: list[Any], words: str, near: list[Any] | None) -> None:
    (problem,) = stage_problems(40, Parallel(pipeline=4, stages=stages))
    assert words in problem
    if near is not None:
        assert problem.endswith(f"nearest: {near}")
        assert not stage_problems(40, Parallel(pipeline=4, stages=near))


def test_stages_that_fit() -> None:
    for stages in ([11, 10, 11, 8], [0, 20, 20, 0], [[0, 5, 5, 5], [10, 5, 5, 5]], []):
        assert not stage_problems(40, Parallel(pipeline=4, stages=stages))
    assert "at most the model's 3 blocks" in stage_problems(3, Parallel(pipeline=4))[0]


def test_micro_batches_that_do_not_fit() -> None:
    virtual = Parallel(pipeline=2, stages=[[1, 1], [1, 1]])
    assert not any(micro_batch_problems(virtual, n) for n in (1, 2, 3, 4, 6, 8))
    for n, near in ((5, "nearest: 4 or 6"), (7, "nearest: 6 or 8")):
        (problem,) = micro_batch_problems(virtual, n)
        assert problem.endswith(near)
    assert not micro_batch_problems(Parallel(pipeline=2), 5)


def test_what_stages_cannot_agree_on(pool: Pool) -> None:
    """All ranks are told the same, and can go on."""
    found = pool.run("pipeline_cases.refusals", 4)
    assert found[0] == found[1] == found[2] == found[3]
    shapes, mixed, inputs, number, missing = found[0]
    assert "all stages must have the same shapes, got stage 0:" in shapes and "stage 1:" in shapes
    assert "all micro-batches of a step must have the same shapes" in mixed
    assert "hidden_states must be" in inputs
    assert "accumulation must be a multiple" in number
    assert "must have micro-batches" in missing
