# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several processes, see checkpoint_cases.py."""

import re
from pathlib import Path

import pytest
import torch

from vidgen.checkpoints.hf import load_state_dict
from vidgen.io import verify_manifest

from .pool import Pool

pytest.importorskip("safetensors")

CASES = "checkpoint_cases."


def test_every_layout_reads_what_every_other_wrote(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(CASES + "hops", 4, folder=str(tmp_path / "runs"))
    assert list(found[0])[-1] == "one process" and len(found[0]) == 9
    assert [hop for rank in found for hop in rank.items() if hop[1]] == []


def test_training_goes_on_while_a_checkpoint_is_written(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(CASES + "asynchronous", 4, folder=str(tmp_path / "run")):
        assert found["while it waits"] == (None, ["step_00000001", "step_00000002.tmp"])
        assert "still being written" in found["second"]
        assert found["outcome"] == (2, "step_00000002", None, None, None)
        assert found["left"] == ["step_00000002"]
        assert found["differs"] == []


@pytest.mark.parametrize(
    "what, words",
    [
        ("data", "rank 2: .*No space left"),
        ("hash", "rank 3: .*No space left"),
        ("begin", "rank 0: .*No space left"),
        ("commit", "rank 0: .*No space left"),
        ("lost file", "rank 0: .*__1_0.distcp"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all(pool: Pool, tmp_path: Path, what: str, words: str) -> None:
    for found in pool.run(CASES + "failures", 4, folder=str(tmp_path / "run"), what=what):
        path, error = found["failed"]
        assert path is None
        assert found["left"] == ["step_00000001"] and found["found"] == "step_00000001"
        assert found["next"] == "step_00000003"
        assert _matches(words, error), error


def _matches(words: str, error: str) -> bool:
    return re.search(words, error, re.S) is not None


@pytest.mark.parametrize(
    "what, found, loaded",
    [
        ("data", "no checkpoint verifies", "__2_0.distcp: its SHA-256 is not"),
        ("by path", "--resume .*__2_0.distcp: its SHA-256", "__2_0.distcp: its SHA-256"),
        ("index", "no checkpoint verifies", ".metadata: "),
        ("manifest", "no checkpoint verifies", "manifest.json"),
        ("unlisted index", "step_00000007", "the manifest does not list distributed/.metadata"),
        ("foreign pickle", "step_00000007", "(os|posix).system has no place there"),
        ("other model", "step_00000007", "is of another model"),
    ],
)
def test_what_is_not_whole_is_refused_on_all_ranks(
    pool: Pool, tmp_path: Path, what: str, found: str, loaded: str
) -> None:
    indices = {"foreign pickle": 1, "other model": 1}
    for told in pool.run(CASES + "refusals", 4, folder=str(tmp_path / "run"), what=what):
        assert _matches(found, told[0]) and _matches(loaded, told[1]), told
        assert told[2] == f"opened {indices.get(what, 0)}"


def test_model_folders_beside_the_shards(pool: Pool, tmp_path: Path) -> None:
    files = pool.run(CASES + "exported", 4, folder=str(tmp_path / "run"))[0]
    assert "model/config.json" in files and "ema/diffusion_pytorch_model.safetensors" in files
    step = tmp_path / "run" / "step_00000007"
    assert verify_manifest(step) == []
    model, ema = (load_state_dict(step / name) for name in ("model", "ema"))
    assert len(model) == len(ema) == 2 + 3 * 6 + 2
    for name, value in model.items():
        assert value.dtype == ema[name].dtype == torch.bfloat16
        is_trained = name not in ("frozen", "table")
        assert torch.equal(ema[name], value) != is_trained


def test_half_precision_and_back(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(CASES + "from_half_precision", 4, folder=str(tmp_path / "run")) == [[]] * 4


def test_a_folder_that_is_not_shared(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(CASES + "not_shared", 4, folder=str(tmp_path / "run"))
    assert len(set(told)) == 1 and "must be a folder that all processes share" in told[0] and "rank 3" in told[0]
