# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that many processes wrote, read by any number of processes.

The files in the folder ``distributed`` are those of torch.distributed.checkpoint: each process writes the boxes of the
tensors that it holds, and an index says which box of which tensor lies where. Names are ``model/NAME`` and
``optimizer/NAME/PART``, with the names of the whole model on one process, and rows and columns in their usual order,
however they were cut and permuted in memory.

The index is a pickle. It is opened after the manifest of the checkpoint has been verified, and by an unpickler that
knows nothing but the classes of such an index.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import config as loading
from vidgen import io

from .hf import CONFIG, INDEX, STEM, WEIGHTS, PretrainedModel, split_into_shards
from .lazy import Lazy, State, write_safetensors

FOLDER = "distributed"
METADATA = f"{FOLDER}/.metadata"
MODEL_FILE = "model.json"  # class and configuration of the model, as in the config.json of a model folder
MODEL, OPTIMIZER, EMA = "model/", "optimizer/", "/ema"


@dataclass(frozen=True)
class Pieces:
    """What one process holds of a tensor of ``shape``: boxes, each with the place of its first element.

    The tensors of ``boxes`` are views: what is read into them is read into the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[tuple[tuple[int, ...], Tensor], ...]


Order = tuple[int, Tensor]  # an axis, and a permutation: index i in memory is index permutation[i] of the whole


def pieces_of(tensor: Tensor, order: Order | None = None) -> Pieces:
    """The pieces of a tensor that is here as a whole, or of the shard of a DTensor that is here.

    Args:
        tensor: of any shape.
        order: where an axis does not lie in its order in memory, see ``Order``; the permutation is int64 and as long as
            the axis of the whole tensor.

    Raises:
        ValueError: ``order`` is no axis of the tensor and a permutation of it; a shard of a size that PyTorch does not
            expect there.
    """
    from torch.distributed.tensor import DTensor

    shape = tuple(tensor.shape)
    if order is not None:
        axis, permutation = order
        if sorted(permutation.tolist()) != list(range(shape[axis] if axis < len(shape) else -1)):
            raise ValueError(
                f"pieces_of: order must be a permutation of axis {axis} of {shape}, got {len(permutation)}"
            )
    start, local = (0,) * len(shape), tensor.detach()
    if isinstance(local, DTensor):
        if not (chunks := local.__create_chunk_list__()) or not chunks[0].offsets:  # not a process of its mesh
            return Pieces(shape, tensor.dtype, ())
        start, size, local = tuple(chunks[0].offsets), tuple(chunks[0].sizes), local.to_local()
        if tuple(local.shape) != size:
            raise ValueError(f"pieces_of: the shard must be {size} of {shape}, got {tuple(local.shape)}")
    if local.numel() == 0:
        return Pieces(shape, tensor.dtype, ())
    if order is None:
        return Pieces(shape, tensor.dtype, ((start, local),))
    axis, length = order[0], local.shape[order[0]]
    own = order[1][start[axis] : start[axis] + length].tolist()
    ends = [i + 1 for i in range(length) if i + 1 == length or own[i + 1] != own[i] + 1]  # of runs that lie together
    boxes = [
        ((*start[:axis], own[begin], *start[axis + 1 :]), local.narrow(axis, begin, end - begin))
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return Pieces(shape, tensor.dtype, tuple(boxes))


def is_distributed(folder: str | Path) -> bool:
    """Whether a checkpoint was written by several processes; says nothing about its being whole."""
    return (Path(folder) / METADATA).is_file()


class Distributed:
    """The tensors of a checkpoint that many processes wrote.

    Args:
        folder: the checkpoint, ``step_00000010``.
        verified: its manifest has been verified by the caller; otherwise it is here, all of it.

    Raises:
        ValueError: no manifest, a file that is not what the manifest says, or an index of anything else.
    """

    def __init__(self, folder: str | Path, *, verified: bool = False) -> None:
        folder = Path(folder)
        problems = [] if verified else io.verify_manifest(folder)
        if not problems and METADATA not in io.manifest_entries(folder):
            problems = [f"the manifest does not list {METADATA}"]
        if problems:
            raise ValueError(f"{folder}: {'; '.join(problems[:10])}")
        self._open(folder)

    @classmethod
    def just_written(cls, folder: Path) -> Distributed:
        """One that this process is about to commit, and which has no manifest yet."""
        self = cls.__new__(cls)
        self._open(folder)
        return self

    def _open(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.folder = folder
        self._index = read_index(folder / METADATA)
        self._files = FileSystemReader(folder / FOLDER)
        self._files.set_up_storage_reader(self._index, is_coordinator=False)
        found = self._index.state_dict_metadata
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry.size) for name, entry in found.items()}
        self.dtypes: dict[str, torch.dtype] = {name: entry.properties.dtype for name, entry in found.items()}

    def model_config(self) -> dict[str, Any]:
        """Class and configuration of the model. Raises ValueError."""
        values = io.read_json(self.folder / MODEL_FILE)
        if not isinstance(values, dict):
            raise ValueError(f"{self.folder / MODEL_FILE}: wanted an object, got {type(values).__name__}")
        return values

    def files(self) -> set[str]:
        """The files that the index speaks of, relative to the checkpoint."""
        return {f"{FOLDER}/{entry.relative_path}" for entry in self._index.storage_data.values()}

    def read(self, targets: Mapping[str, Pieces]) -> None:
        """Fill the boxes of ``targets``, which may be cut in any way; each is cast to the dtype that it has."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        items = []
        for name, pieces in targets.items():
            chunks = [ChunkStorageMetadata(torch.Size(start), box.size()) for start, box in pieces.boxes]
            items += create_read_items_for_chunk_list(name, self._index.state_dict_metadata[name], chunks)
        self._files.read_data(LoadPlan(items), _filler(targets)).wait()

    def lazy(self, name: str) -> Lazy:
        """One tensor, read when asked for."""

        def load() -> Tensor:
            whole = torch.empty(self.shapes[name], dtype=self.dtypes[name])
            self.read({name: pieces_of(whole)})
            return whole

        return Lazy(self.shapes[name], self.dtypes[name], load)

    def weights(self, *, ema: bool = False) -> State:
        """The model's tensors by their names; with ``ema`` the running average of those that have one.

        Raises:
            ValueError: ``ema``, and there is no average at all.
        """
        names = [name.removeprefix(MODEL) for name in self.shapes if name.startswith(MODEL)]
        averages = {name: f"{OPTIMIZER}{name}{EMA}" for name in names} if ema else {}
        if ema and not any(average in self.shapes for average in averages.values()):
            raise ValueError(f"{self.folder} keeps no running average")
        places = {name: averages.get(name, "") for name in names}
        return {name: self.lazy(place if place in self.shapes else MODEL + name) for name, place in places.items()}


def read_index(file: Path) -> Any:
    """The index of torch.distributed.checkpoint. Raises ValueError where it names anything but its own classes."""
    with open(file, "rb") as stream:
        try:
            index = _Unpickler(stream).load()
        except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, TypeError) as error:
            raise ValueError(f"{file}: not an index of torch.distributed.checkpoint: {error}") from error
    if not isinstance(getattr(index, "state_dict_metadata", None), dict) or not index.storage_data:
        raise ValueError(f"{file}: not an index of torch.distributed.checkpoint")
    return index


class _Unpickler(pickle.Unpickler):
    """Knows the classes that stand in an index, and no others."""

    MODULE = "torch.distributed.checkpoint."
    CLASSES = {
        f"{MODULE}metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        f"{MODULE}filesystem": ("_StorageInfo",),
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),  # its name in Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place there")


def _filler(targets: Mapping[str, Pieces]) -> Any:
    from torch.distributed.checkpoint import DefaultLoadPlanner

    places = {(name, start): box for name, pieces in targets.items() for start, box in pieces.boxes}

    class Filler(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> Tensor:
            box = places[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
            for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
                box = box.narrow(axis, start, length)
            return box

        def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
            pass

    return Filler()


# Model folders


def describe_model(model: PretrainedModel) -> dict[str, Any]:
    """The content of ``model.json``."""
    return {"_class_name": type(model).__name__, **loading.to_dict(model.config)}


def write_model_folder(
    folder: Path,
    state: State,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model folder tensor by tensor: ``config.json`` and safetensors, in shards where they are large.

    ``dtype``: of all floating-point tensors; default: as they are.
    """
    state = {name: t if dtype is None else cast(t, dtype) for name, t in state.items()}
    folder.mkdir(parents=True)
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    shards = split_into_shards(shapes, max_shard_bytes)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"{STEM}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, keys in zip(names, shards, strict=True):
        write_safetensors(folder / name, {key: state[key] for key in keys})
    if count > 1:
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(t.num_bytes for t in state.values())
        io.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    io.write_json(folder / CONFIG, dict(config))


def cast(tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """``tensor`` in another dtype, unless it holds whole numbers or booleans."""
    if not tensor.dtype.is_floating_point or tensor.dtype == dtype:
        return tensor
    return Lazy(tensor.shape, dtype, lambda: tensor.load().to(dtype))
