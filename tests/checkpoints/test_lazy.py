# SPDX-License-Identifier: Apache-2.0
"""Files read and written tensor by tensor are the files that torch and safetensors read and write."""

import argparse
import enum
import random
import sys
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.checkpoints import lazy as lazies
from vidgen.checkpoints.lazy import Lazy, TorchFile, chunk, join, lazy, narrow, read_torch

TENSORS = {
    "matrix": torch.arange(35.0).reshape(5, 7),
    "half": torch.randn(3).bfloat16(),
    "scalar": torch.tensor(4),
    "empty": torch.zeros(0, 3),
    "view": torch.randn(64, 65)[:, :20],
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(7, dtype=torch.uint8),
}


def as_lazy() -> dict[str, Lazy]:
    return {name: lazy(tensor) for name, tensor in TENSORS.items()}


def check(found: dict[str, Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("limit", [None, 100])
def test_torch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    if limit is not None:  # entries then have the header of those beyond 2 GB
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    lazies.write_torch(tmp_path / "a.pt", {"model": as_lazy(), "iteration": 3, "names": ["x"]})
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["iteration"] == 3 and content["names"] == ["x"]
    check(content["model"])
    mapped = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    check(mapped["model"])
    assert all(tensor.data_ptr() % lazies.ALIGNMENT == 0 for tensor in mapped["model"].values() if tensor.numel())
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
    check({name: t.load() for name, t in TorchFile(tmp_path / "a.pt").state("model").items()})


def test_safetensors_files(tmp_path: Path) -> None:
    lazies.write_safetensors(tmp_path / "a.safetensors", as_lazy())
    check(load_file(tmp_path / "a.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "b.safetensors")
    for name in "ab":
        check({key: t.load() for key, t in lazies.read_safetensors(tmp_path / f"{name}.safetensors").items()})


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(lazies, "REMAP_BYTES", 1)  # mapped anew for every tensor
    state = TorchFile(tmp_path / "a.pt").state()
    assert state["matrix"].shape == (5, 7) and state["half"].dtype == torch.bfloat16
    for _ in range(2):
        check({name: t.load() for name, t in state.items()})


def test_files_are_unmapped_together_after_enough_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        torch.save(TENSORS, tmp_path / f"{name}.pt")
    files = [TorchFile(tmp_path / f"{name}.pt") for name in "ab"]
    states = [file.state() for file in files]
    monkeypatch.setattr(lazies, "REMAP_BYTES", 200)
    kept = states[0]["matrix"].load()
    first = [file.content() for file in files]
    states[1]["matrix"].load()  # 280 bytes by now, in two files
    assert all(file.content() is content for file, content in zip(files, first, strict=True))
    states[1]["flags"].load()
    assert all(file.content() is not content for file, content in zip(files, first, strict=True))
    assert torch.equal(kept, TENSORS["matrix"])


def test_parts() -> None:
    whole = lazy(torch.arange(24).reshape(6, 4))
    assert torch.equal(join(chunk(whole, 0, 3), 0).load(), whole.load())
    assert torch.equal(join(chunk(whole, 1, 2), 1).load(), whole.load())
    part = narrow(whole, 0, 2, 3)
    assert part.shape == (3, 4) and torch.equal(part.load(), whole.load()[2:5]) and part.num_bytes == 96


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    changed = Lazy((2, 3), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x was \(2, 3\) of torch.float32, is \(3, 2\)"):
        lazies.write_safetensors(tmp_path / "a.safetensors", {"x": changed})
    assert not list(tmp_path.iterdir())


def test_dtypes_without_a_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        lazies.write_safetensors(tmp_path / "a.safetensors", {"x": lazy(torch.zeros(2, dtype=torch.complex64))})
    with pytest.raises(ValueError, match="float8_e4m3fn has no place"):
        lazies.write_torch(tmp_path / "a.pt", {"x": lazy(torch.zeros(2).to(torch.float8_e4m3fn))})
    assert not list(tmp_path.iterdir())


# What lies beside weights


def test_arguments_and_random_states(tmp_path: Path) -> None:
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    torch.save({"args": argparse.Namespace(lr=1e-5), "rng_state": [states], "model": TENSORS}, tmp_path / "a.pt")
    content = read_torch(tmp_path / "a.pt")
    assert content["args"].lr == 1e-5 and len(content["rng_state"][0]["np_rng_state"][1]) == 624
    check(content["model"])


def test_classes_of_the_trainer_become_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron.core.enums")
    kinds = enum.Enum("ModelType", {"encoder": 1}, module=module.__name__)
    record = type("ShardInfo", (), {"__module__": module.__name__})
    module.ModelType, module.ShardInfo = kinds, record  # type: ignore[attr-defined]
    instance = record()
    instance.shape = torch.Size([2, 3])
    with monkeypatch.context() as patch:
        for name in ("megatron", "megatron.core", "megatron.core.enums"):
            patch.setitem(sys.modules, name, module)
        torch.save({"kind": kinds.encoder, "info": instance, "model": TENSORS}, tmp_path / "a.pt")
    content = read_torch(tmp_path / "a.pt")
    assert content["info"].shape == (2, 3) and content["kind"].arguments == (1,)
    check(content["model"])


class Harmful:
    def __reduce__(self):
        return print, ("code from the file ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool) -> None:
    torch.save({"model": TENSORS, "rng": Harmful()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="more than tensors"):
        read_torch(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_damaged_files(tmp_path: Path) -> None:
    torch.save({"model": TENSORS}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-300])
    with pytest.raises(ValueError, match="a.pt is damaged"):
        read_torch(tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="wanted a map of names to tensors, got list"):
        read_torch(tmp_path / "b.pt")
    (tmp_path / "c.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        lazies.read_safetensors(tmp_path / "c.safetensors")
    for name, read in (("x.pt", read_torch), ("x.safetensors", lazies.read_safetensors)):
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            read(tmp_path / name)
