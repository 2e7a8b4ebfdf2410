# SPDX-License-Identifier: Apache-2.0
"""Tensors that stay in their files until they are written to another one.

A state here is a map of names to :class:`Lazy` tensors: shape and dtype are known, values are read when asked for and
forgotten by whoever asked. Renaming, cutting and joining states therefore costs no memory, and writing one costs that
of its largest tensor.

``.pt`` files are read by ``torch.load(weights_only=True, mmap=True)``. They are written here as the zip archives that
``torch.save`` makes (pickle, then one stored record for each tensor), but record by record.
"""

from __future__ import annotations

import argparse
import collections
import io as buffers
import json
import math
import pickle
import struct
import weakref
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidgen import io

from .hf import UNPICKLING_ERRORS, safetensors

# Pages of a mapped file count as the process's memory from their first use until the file is unmapped, so all files are
# unmapped after this many bytes.
REMAP_BYTES = 32_000_000
ALIGNMENT = 64  # of tensors in files, as torch.save has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Classes of the training code whose instances lie beside the weights (arguments, shard records).
TRAINER_MODULES = ("megatron", "mindspeed", "mindspeed_mm")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when asked for: ``load()`` gives it, on the processor, and keeps nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor] = field(repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


State = dict[str, Lazy]


def lazy(tensor: Tensor) -> Lazy:
    """A tensor in memory as a lazy one."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def narrow(source: Lazy, axis: int, start: int, length: int) -> Lazy:
    """A range of ``source`` along an axis."""
    shape = (*source.shape[:axis], length, *source.shape[axis + 1 :])
    return Lazy(shape, source.dtype, lambda: source.load().narrow(axis, start, length))


def chunk(source: Lazy, axis: int, count: int) -> list[Lazy]:
    """Equal parts along an axis whose length is a multiple of ``count``."""
    length = source.shape[axis] // count
    return [narrow(source, axis, i * length, length) for i in range(count)]


def join(parts: Sequence[Lazy], axis: int) -> Lazy:
    """Parts one after another along an axis."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].shape
    shape = (*first[:axis], sum(p.shape[axis] for p in parts), *first[axis + 1 :])
    return Lazy(shape, parts[0].dtype, lambda: torch.cat([p.load() for p in parts], axis))


# Reading


class TorchFile:
    """A ``.pt`` file: its containers in memory, its tensors on disk.

    Raises ValueError where the file is missing, damaged, or holds more than tensors and plain data.
    """

    _open: ClassVar[weakref.WeakSet[TorchFile]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_mapped = zipfile.is_zipfile(path)  # older files are read whole, once
        self._touched = 0
        self._content: Any = None
        TorchFile._open.add(self)

    def content(self) -> Any:
        if self._content is None:
            self._content = read_torch(self.path)
        return self._content

    @classmethod
    def _unmap(cls) -> None:
        """Let go of all mappings once enough of them has been touched; they come back when they are needed."""
        files = [file for file in cls._open if file._is_mapped]
        if sum(file._touched for file in files) > REMAP_BYTES:
            for file in files:
                file._content, file._touched = None, 0

    def state(self, *keys: str) -> State:
        """The tensors of the map that lies under these keys; entries that are no tensors are left out."""
        found = self.content()
        for key in keys:
            found = found[key]
        return {str(name): self._lazy(value, (*keys, name)) for name, value in found.items() if is_tensor(value)}

    def _lazy(self, tensor: Tensor, where: tuple[Any, ...]) -> Lazy:
        def load() -> Tensor:
            TorchFile._unmap()
            value = self.content()
            for key in where:
                value = value[key]
            self._touched += value.numel() * value.element_size()
            return value.detach()

        return Lazy(tuple(tensor.shape), tensor.dtype, load)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


class Record:
    """Stands for an instance of a class of the training code: keeps its attributes and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def read_torch(path: Path) -> dict[Any, Any]:
    """A ``.pt`` file's content, memory-mapped, by the restricted unpickler and no other way.

    Training checkpoints hold arguments, random states and records beside the weights. Plain namespaces and numpy arrays
    are admitted; classes of Megatron and MindSpeed become inert records; anything else is refused.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals(_admitted(path)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"{path} is damaged or holds more than tensors and plain data: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted a map of names to tensors, got {type(content).__name__}")
    return content


def _admitted(path: Path) -> list[Any]:
    admitted: list[Any] = [argparse.Namespace]
    if not zipfile.is_zipfile(path):
        return admitted
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        if name.split(".")[0] in TRAINER_MODULES:
            # A class of its own for each: the unpickler finds names by class.
            admitted.append((type("Record", (Record,), {}), name))
        elif name.split(".")[0] == "numpy":
            admitted += _numpy_array_parts(name)
    return admitted


def _numpy_array_parts(name: str) -> list[Any]:
    """What rebuilds an array of numbers, under the name that this numpy or an older one gave it."""
    import numpy

    parts = {"ndarray": numpy.ndarray, "dtype": numpy.dtype}
    if name in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
        numbers = [
            type(numpy.dtype(kind)) for kind in ("uint8", "uint32", "uint64", "int32", "int64", "float32", "float64")
        ]
        return [(numpy._core.multiarray._reconstruct, name), *numbers]  # type: ignore[attr-defined]
    return [parts[name[6:]]] if name[6:] in parts else []


def read_safetensors(path: Path) -> State:
    """The tensors of one safetensors file. Raises ValueError where it is missing or damaged."""
    library = safetensors()
    if not path.is_file():
        raise ValueError(f"{path} does not exist")

    def one(key: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            with library.safe_open(path, "pt") as file:  # unmapped when the tensor is dropped
                tensor: Tensor = file.get_tensor(key)
            return tensor

        return load

    state: State = {}
    try:
        with library.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{path}: {key} has the dtype {part.get_dtype()}, wanted one of {', '.join(DTYPES)}"
                    )
                state[key] = Lazy(tuple(part.get_shape()), DTYPES[part.get_dtype()], one(key))
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return state


# Writing


def values(tensor: Lazy, name: str) -> memoryview:
    """The bytes of a tensor, row by row."""
    loaded = tensor.load()
    if tuple(loaded.shape) != tensor.shape or loaded.dtype != tensor.dtype:
        raise ValueError(f"{name} was {tensor.shape} of {tensor.dtype}, is {tuple(loaded.shape)} of {loaded.dtype}")
    flat = loaded.detach().contiguous().reshape(-1).view(torch.uint8)
    bytes_: Any = flat.numpy()  # an array is a buffer, which its type does not say
    return memoryview(bytes_)


def write_safetensors(path: Path, state: Mapping[str, Lazy]) -> None:
    """Write ``state`` as one safetensors file, tensor by tensor, atomically."""
    unknown = [f"{name}: {t.dtype}" for name, t in state.items() if t.dtype not in DTYPE_NAMES]
    if unknown:
        raise ValueError(f"{path}: safetensors has no such dtype: {', '.join(unknown[:10])}")
    # Wider types first, so that every tensor is aligned to its own.
    order = sorted(state, key=lambda name: -state[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        t, end = state[name], position + state[name].num_bytes
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with io.atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(values(state[name], name))


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, plain containers with lazy tensors in them, as ``torch.save`` would, atomically."""
    tensors: list[Lazy] = []
    pickled = buffers.BytesIO()
    _Pickler(pickled, tensors).dump(content)
    with io.atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, file, "data.pkl", [pickled.getbuffer()], len(pickled.getbuffer()))
        _record(archive, file, "byteorder", [memoryview(b"little")], 6)
        for number, tensor in enumerate(tensors):
            name = f"data/{number}"
            _record(archive, file, name, (values(t, name) for t in (tensor,)), tensor.num_bytes)
        _record(archive, file, "version", [memoryview(b"3\n")], 2)


def _record(archive: zipfile.ZipFile, file: Any, name: str, blocks: Any, size: int) -> None:
    """One stored entry whose bytes begin at a multiple of the alignment, so that readers can map them."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = size
    wide = size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile then adds twenty bytes to the header
    start = file.tell() + 30 + len(info.filename) + 20 * wide
    gap = -(start + 4) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, gap) + b"Z" * gap  # "FB", the filler that torch.save uses
    with archive.open(info, "w") as entry:
        for block in blocks:
            entry.write(block)


@dataclass(frozen=True)
class _Storage:
    number: int
    dtype: torch.dtype
    size: int


class _Pickler(pickle.Pickler):
    """Pickles lazy tensors as what PyTorch rebuilds tensors from, and remembers them in their order."""

    def __init__(self, file: Any, tensors: list[Lazy]) -> None:
        super().__init__(file, protocol=2)
        self.tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kinds = torch.storage._dtype_to_storage_type_map()
        if value.dtype not in kinds:
            raise ValueError(f"write_torch: {value.dtype} has no place in .pt files; write safetensors")
        return "storage", getattr(torch, kinds[value.dtype]), str(value.number), "cpu", value.size

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Lazy):
            return NotImplemented
        strides = [math.prod(s or 1 for s in value.shape[i + 1 :]) for i in range(len(value.shape))]
        storage = _Storage(len(self.tensors), value.dtype, math.prod(value.shape))
        self.tensors.append(value)
        arguments: tuple[Any, ...] = (storage, 0, value.shape, tuple(strides), False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments
