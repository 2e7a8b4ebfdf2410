# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several processes, see checkpoint_cases.py."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.checkpoints import distributed
from vidgen.checkpoints.convert import convert
from vidgen.checkpoints.hf import load_state_dict
from vidgen.io import verify_manifest
from vidgen.pipelines.folders import weights_folder
from vidgen.train import sharded_checkpoint
from vidgen.train.optimizer import EMAAdamW

from . import tiny
from .pool import Pool

pytest.importorskip("safetensors")

CASES = "checkpoint_cases."


def test_every_layout_reads_what_every_other_wrote(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(CASES + "hops", 4, folder=str(tmp_path / "runs"))
    assert list(found[0])[-1] == "one process" and len(found[0]) == 7
    assert [hop for rank in found for hop in rank.items() if hop[1]] == []


@pytest.mark.slow
def test_runs_go_on_from_each_other_on_other_layouts(pool: Pool, tmp_path: Path) -> None:
    """One process, FSDP over 4, tensor parallel x FSDP, pipeline x FSDP, one process: a step each."""
    found = pool.run(CASES + "resumed", 4, folder=tmp_path, system="opensora_v2")[0]
    assert max(found.values()) < 1e-5, found


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


# Without processes


def save_shards(folder: Path, model: Any, optimizer: EMAAdamW | None) -> Path:
    """A checkpoint in the middle of a run, as many processes write it; here by one."""
    state = {} if optimizer is None else sharded_checkpoint.state_by_name(model, optimizer)
    saver = sharded_checkpoint.Saver(folder, keep=1, groups=None)
    groups = [] if optimizer is None else optimizer.param_groups
    pieces = sharded_checkpoint.snapshot(model, state)
    saver.start(3, pieces, lambda to: sharded_checkpoint.write_small_files(to, model, groups))
    outcome = saver.wait()
    assert outcome is not None and outcome.path is not None, outcome
    return outcome.path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_shards_are_converted_without_processes(tmp_path: Path, system: str) -> None:
    model = tiny.make_model(system)
    parameters = list(model.parameters())
    optimizer = EMAAdamW(parameters, lr=0.1, ema_decay=0.5)
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    shards = save_shards(tmp_path, model, optimizer)
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    with optimizer.use_ema():
        averages = {name: t.clone() for name, t in model.state_dict().items()}
    for ema, tensors in ((None, wanted), (False, wanted), (True, averages)):
        report = convert(shards, tmp_path / f"hf-{ema}", to="hf", ema=ema)
        assert report["model"] == system
        read = type(model).from_pretrained(tmp_path / f"hf-{ema}")
        assert read.config == model.config
        got = read.state_dict()
        assert got.keys() == tensors.keys()
        assert [name for name, t in tensors.items() if not torch.equal(got[name], t)] == []
    assert [name for name, t in wanted.items() if torch.equal(averages[name], t)] == [next(iter(wanted))]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_that_cannot_be_converted(tmp_path: Path) -> None:
    shards = save_shards(tmp_path, tiny.make_model("cogvideox"), None)
    for source, options, words in (
        (shards, {"ema": True}, "keeps no running average"),
        (shards / "distributed", {}, "name the checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(source, tmp_path / "out", to="hf", **options)
    with pytest.raises(ValueError, match="vidgen convert .*step_00000003 FOLDER --to hf --ema"):
        weights_folder(tmp_path)
    (shards / "distributed" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match="__0_0.distcp: 0 bytes, the manifest says"):
        convert(shards, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


class _Evil:
    """What making a folder looks like in a pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_an_index_may_name_nothing_but_its_own_classes(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    contents = {
        pickle.dumps(_Evil(trace)): "mkdir has no place there",
        b"ctorch\nload\n.": "torch.load has no place there",
        b"cbuiltins\neval\n.": "builtins.eval has no place there",
        b"": "",
        b"(dp0\n.": "",
    }
    for content, words in contents.items():
        (tmp_path / "index").write_bytes(content)
        with pytest.raises(ValueError, match=f"not an index of torch.distributed.checkpoint.*{words}"):
            distributed.read_index(tmp_path / "index")
    assert not trace.exists()


def test_rows_in_another_order() -> None:
    whole, order = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 4, 5, 2, 3])
    pieces = distributed.pieces_of(whole, (0, order))
    assert [(start, len(box)) for start, box in pieces.boxes] == [((0, 0), 2), ((4, 0), 2), ((2, 0), 2)]
    for start, box in pieces.boxes:
        assert torch.equal(box, torch.stack([whole[(order == start[0] + i).nonzero()[0, 0]] for i in range(len(box))]))
        assert box.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="must be a permutation"):
        distributed.pieces_of(whole, (0, torch.tensor([0, 1, 2, 3, 4, 4])))
    columns = distributed.pieces_of(whole, (1, torch.tensor([1, 0])))
    assert [(start, box[:, 0].tolist()) for start, box in columns.boxes] == [
        ((0, 1), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
        ((0, 0), [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]),
    ]
    assert distributed.pieces_of(torch.empty(0, 3)).boxes == ()
