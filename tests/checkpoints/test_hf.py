# SPDX-License-Identifier: Apache-2.0
"""Model folders: round trips, and what is refused."""

import json
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vidgen import io
from vidgen.checkpoints import PretrainedModel, load_into, load_state_dict
from vidgen.checkpoints.hf import CONFIG, INDEX, WEIGHTS


@dataclass(frozen=True)
class SmallConfig:
    dims: tuple[int, ...] = (4, 3, 2)
    bias: bool = True


class SmallModel(PretrainedModel):
    config_class = SmallConfig

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        pairs = zip(config.dims, config.dims[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b, config.bias) for a, b in pairs)
        self.register_buffer("steps", torch.tensor(7))

    def ignored_keys(self) -> tuple[str, ...]:
        return ("*._extra_state",)


class OtherModel(SmallModel):
    pass


@pytest.fixture
def model() -> SmallModel:
    return SmallModel(SmallConfig())


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_single_file(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert names(folder) == [CONFIG, WEIGHTS]
    assert json.loads((folder / CONFIG).read_text()) == {"_class_name": "SmallModel", "dims": [4, 3, 2], "bias": True}
    again = SmallModel.from_pretrained(folder)
    assert same(again, model) and again.config == model.config and not again.training
    assert all(p.requires_grad for p in again.parameters())


def test_shards(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_bytes=60)
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names(tmp_path) == [CONFIG, *shards, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * (12 + 3 + 6 + 2) + 8}
    assert index["weight_map"] == dict(zip(model.state_dict(), [shards[0]] * 2 + [shards[1]] * 3, strict=True))
    for shard in shards:
        assert {key for key, place in index["weight_map"].items() if place == shard} == set(load_file(tmp_path / shard))
    assert same(SmallModel.from_pretrained(tmp_path), model)


def test_every_tensor_in_a_shard_of_its_own(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_bytes=1)
    assert len(names(tmp_path)) == 2 + len(model.state_dict())
    assert same(SmallModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("first, second", [(60, 10**9), (10**9, 60), (1, 60)])
def test_saving_again_leaves_nothing_of_the_older_model(
    model: SmallModel, tmp_path: Path, first: int, second: int
) -> None:
    SmallModel(SmallConfig((9, 8))).save_pretrained(tmp_path, max_shard_bytes=first)
    model.save_pretrained(tmp_path, max_shard_bytes=second)
    (tmp_path / "fresh").mkdir()
    model.save_pretrained(tmp_path / "fresh", max_shard_bytes=second)
    assert names(tmp_path) == sorted([*names(tmp_path / "fresh"), "fresh"])
    assert same(SmallModel.from_pretrained(tmp_path), model)


def test_bfloat16(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    low = SmallModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.steps.dtype == torch.int64 and low.steps == 7
    assert torch.equal(low.layers[0].weight, model.layers[0].weight.bfloat16())
    low.save_pretrained(tmp_path)
    stored = SmallModel.from_pretrained(tmp_path)
    assert same(stored, low)
    assert {p.dtype for p in SmallModel.from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_weights_are_independent_of_the_file(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = SmallModel.from_pretrained(tmp_path)
    stored = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        again.layers[0].weight.zero_()
    assert (tmp_path / WEIGHTS).read_bytes() == stored
    with open(tmp_path / WEIGHTS, "r+b") as file:  # in place, as no file of ours is written
        file.write(b"\xff" * len(stored))
    assert torch.equal(again.layers[1].weight, model.layers[1].weight)


def test_state_instead_of_the_models_own(model: SmallModel, tmp_path: Path) -> None:
    average = {key: t + 1 for key, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state=average)
    assert torch.equal(SmallModel.from_pretrained(tmp_path).layers[1].bias, model.layers[1].bias + 1)
    del average["layers.1.bias"]
    with pytest.raises(ValueError, match="1 missing:\n *layers.1.bias"):
        model.save_pretrained(tmp_path, state=average)
    assert (tmp_path / CONFIG).exists()
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        model.save_pretrained(tmp_path, max_shard_bytes=0)


def test_interrupted_save_is_not_a_model(model: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path, max_shard_bytes=60)
    monkeypatch.setattr(io, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path, max_shard_bytes=60)
    with pytest.raises(ValueError, match="config.json does not exist"):
        SmallModel.from_pretrained(tmp_path)


# What does not fit


def test_misfits_are_listed_with_the_nearest_names(model: SmallModel) -> None:
    state = dict(model.state_dict())
    state["layers.0.wieght"] = state.pop("layers.0.weight")
    state["layers.1.bias"] = torch.zeros(5)
    state["steps"] = "seven"
    with pytest.raises(ValueError) as error:
        load_into(model, state)
    assert str(error.value) == (
        "load_into: the weights do not fit SmallModel\n"
        "  1 missing:\n    layers.0.weight (nearest: layers.0.wieght)\n"
        "  1 unexpected:\n    layers.0.wieght (nearest: layers.0.weight)\n"
        "  2 of the wrong shape:\n    steps: wanted a tensor, got str\n    layers.1.bias: wanted (2,), got (5,)"
    )


def test_only_the_first_ten_are_listed(model: SmallModel) -> None:
    state = {**model.state_dict(), **{f"extra.{i:02}": torch.zeros(1) for i in range(13)}}
    with pytest.raises(ValueError) as error:
        load_into(model, state)
    assert "13 unexpected" in str(error.value) and "extra.09" in str(error.value) and "and 3 more" in str(error.value)
    assert "extra.10" not in str(error.value)


def test_a_refused_load_changes_nothing(model: SmallModel) -> None:
    before = {key: t.clone() for key, t in model.state_dict().items()}
    state = {key: t + 1 for key, t in before.items()}
    state["layers.1.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError):
        load_into(model, state)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_load_into_overwrites_in_the_models_dtype(model: SmallModel) -> None:
    parameter = model.layers[0].weight
    load_into(model, {key: (t + 1).double() for key, t in model.state_dict().items()})
    assert model.layers[0].weight is parameter and parameter.dtype == torch.float32
    assert model.steps == 8


def test_ignored_names(model: SmallModel) -> None:
    state: dict[str, Any] = {**model.state_dict(), "layers.0._extra_state": None}
    load_into(model, state, ignore=["*._extra_state"])
    load_into(model, state, ignore=["*"])  # names that the model has are never ignored
    del state["steps"]
    with pytest.raises(ValueError, match="1 missing:\n *steps"):
        load_into(model, state, ignore=["*"])
    state["steps"] = torch.tensor(3)
    with pytest.raises(ValueError, match="layers.0._extra_state"):
        load_into(model, state, ignore=["_extra_state"])


def test_buffers_outside_the_state_dict_are_refused(tmp_path: Path) -> None:
    class Hidden(SmallModel):
        def __init__(self, config: SmallConfig) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.ones(3), persistent=False)

    Hidden(SmallConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hidden keeps .'table'. outside its state dict"):
        Hidden.from_pretrained(tmp_path)


# What is refused


def test_config_of_another_model(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a SmallModel, wanted a OtherModel"):
        OtherModel.from_pretrained(tmp_path)
    io.write_json(tmp_path / CONFIG, {"_diffusers_version": "0.34", "dims": [4, 3, 2], "biass": True})
    with pytest.raises(ValueError, match="biass: unknown name, did you mean bias"):
        SmallModel.from_pretrained(tmp_path)
    io.write_json(tmp_path / CONFIG, {"_diffusers_version": "0.34", "dims": [4, 3, 2]})
    assert same(SmallModel.from_pretrained(tmp_path), model)
    io.write_json(tmp_path / CONFIG, [1])
    with pytest.raises(ValueError, match="wanted an object, got list"):
        SmallModel.from_pretrained(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither"):
        load_state_dict(tmp_path)
    (tmp_path / "model_ema.pt").touch()
    with pytest.raises(ValueError, match="name one of its files: model_ema.pt"):
        load_state_dict(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_state_dict(tmp_path / "nothing.pt")
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match="wanted .safetensors"):
        load_state_dict(tmp_path / "weights.npz")


def test_two_models_in_one_folder(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_bytes=60)
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="which one is the model"):
        SmallModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_safetensors(model: SmallModel, tmp_path: Path, keep: int) -> None:
    model.save_pretrained(tmp_path)
    stored = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(stored[:keep])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SmallModel.from_pretrained(tmp_path)


def damaged_index(index: dict[str, Any], how: str) -> Any:
    places = index["weight_map"]
    if how == "leaves the folder":
        return {"weight_map": {key: f"../{name}" for key, name in places.items()}}
    if how == "absolute":
        return {"weight_map": {key: f"/{name}" for key, name in places.items()}}
    if how == "pickle":
        return {"weight_map": dict.fromkeys(places, "model.pt")}
    if how == "no map":
        return {"weight_map": [1]}
    if how == "not names":
        return {"weight_map": dict.fromkeys(places, 3)}
    if how == "too few":
        return {"weight_map": {key: name for key, name in places.items() if key != "steps"}}
    return {"weight_map": {**places, "layers.7.weight": next(iter(places.values()))}}


REFUSED_INDEX = {
    "leaves the folder": "is not a safetensors file of this folder",
    "absolute": "is not a safetensors file of this folder",
    "pickle": "is not a safetensors file of this folder",
    "no map": "wanted a weight_map",
    "not names": "wanted a weight_map",
    "too few": "1 unexpected:\n *steps",
    "too many": "1 missing:\n *layers.7.weight",
}


@pytest.mark.parametrize("how", REFUSED_INDEX)
def test_damaged_index(model: SmallModel, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "folder"
    model.save_pretrained(folder, max_shard_bytes=60)
    for shard in folder.glob("*.safetensors"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    index = json.loads((folder / INDEX).read_text())
    io.write_json(folder / INDEX, damaged_index(index, how))
    with pytest.raises(ValueError, match=REFUSED_INDEX[how]):
        load_state_dict(folder)


def test_missing_shard(model: SmallModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_bytes=60)
    next(tmp_path.glob("*00001-of*")).unlink()
    with pytest.raises(ValueError, match="00001-of-00002.safetensors is not a readable"):
        SmallModel.from_pretrained(tmp_path)


# Pickles


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_pickled_tensors(model: SmallModel, tmp_path: Path, suffix: str, zipped: bool) -> None:
    file = tmp_path / f"model{suffix}"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    assert same(SmallModel.from_pretrained(file, config=model.config), model)
    with pytest.raises(ValueError, match="config= with the weights"):
        SmallModel.from_pretrained(file)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    torch.save({"weight": Touch(victim)}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"weight": Touch(victim)}, protocol=2))
    for name in ("model.pt", "plain.pt"):
        with pytest.raises(ValueError, match="damaged or holds more than tensors"):
            load_state_dict(tmp_path / name)
    assert not victim.exists()


def test_damaged_pickles(model: SmallModel, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    stored = file.read_bytes()
    for content in (b"", b"\x80", stored[: len(stored) // 2], b"no pickle at all", stored[:-30]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="model.pt"):
            load_state_dict(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ValueError, match="wanted a map of names to tensors, got list"):
        load_state_dict(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.pt", "legacy.pt", "model.safetensors"])
def test_corrupted_bytes_raise_value_errors_only(tmp_path: Path, name: str) -> None:
    state, file, draw = {"a": torch.ones(3, 4), "b": torch.zeros(2)}, tmp_path / name, random.Random(0)
    if name == "model.safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name == "model.pt")
    stored, refused = file.read_bytes(), 0
    for _ in range(200):
        content = bytearray(stored)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(min(len(content), 600))] = draw.randrange(256)
        file.unlink()
        file.write_bytes(content)
        try:
            load_state_dict(file)
        except ValueError:
            refused += 1
    assert refused > 20
