# SPDX-License-Identifier: Apache-2.0
"""Model folders in Hugging Face's layout: ``config.json`` beside one safetensors file, or shards with an index.

A folder is complete when it has its ``config.json``: saving over an older model takes that file away first and writes
it last, so that a save that was cut off is never mistaken for a model.
"""

from __future__ import annotations

import difflib
import fnmatch
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vidgen import config as loading
from vidgen import io

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
# What a damaged or hostile file can drive PyTorch's restricted unpickler to.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
SHOWN = 10  # names of each kind in an error message


class PretrainedModel(nn.Module):
    """A model with a configuration dataclass that is saved to and loaded from folders.

    A subclass sets ``config_class``, takes the configuration as its only constructor argument and keeps it as
    ``self.config``. Where original checkpoints differ from ours, it overrides the three methods below.
    """

    config_class: ClassVar[type]
    config: Any

    @staticmethod
    def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
        """What a file holds, in any form that is known, as a flat map in the model's names."""
        return dict(state)

    def fit_state_dict(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What :meth:`convert_state_dict` returned, in the shapes that this model has them in."""
        return dict(state)

    def ignored_keys(self) -> tuple[str, ...]:
        """Shell patterns of names that a checkpoint may hold and the model has no use for."""
        return ()

    @classmethod
    def from_pretrained(cls: type[Model], path: str | Path, **options: Any) -> Model:
        """See :func:`from_pretrained`."""
        return from_pretrained(cls, path, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """See :func:`save_pretrained`."""
        save_pretrained(self, folder, **options)


Model = TypeVar("Model", bound=PretrainedModel)


def from_pretrained(
    cls: type[Model],
    path: str | Path,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """Build ``cls`` from a model folder, or from a file of weights and a configuration.

    The model is built on the meta device and filled tensor by tensor, so that memory holds its weights once. It is
    returned in eval mode.

    Args:
        cls: a :class:`PretrainedModel`.
        path: a folder, or one ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file.
        config: an instance of ``cls.config_class`` to use instead of the folder's ``config.json``.
        dtype: of all floating-point weights; default: as they are stored.
        device: default: the processor.

    Raises:
        ValueError: no configuration, one of another model, a damaged file, or tensors that do not fit the model.
    """
    path = Path(path)
    if config is None:
        config = read_config(cls, path)
    with torch.device("meta"):
        model = cls(config)
    state = model.fit_state_dict(cls.convert_state_dict(load_state_dict(path)))
    for key in list(state):
        if isinstance(state[key], Tensor):
            tensor = state[key]
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            # A copy, so that the weights outlive the file and have PyTorch's alignment.
            state[key] = torch.empty_like(tensor, dtype=kind, device=device or "cpu").copy_(tensor)
    load_into(model, state, ignore=model.ignored_keys())
    unfilled = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if unfilled:
        raise ValueError(f"from_pretrained: {cls.__name__} keeps {unfilled[:SHOWN]} outside its state dict")
    return model.eval()


def read_config(cls: type[PretrainedModel], folder: str | Path) -> Any:
    """The configuration in a folder's ``config.json`` as ``cls.config_class``. Raises ValueError."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise ValueError(f"from_pretrained: {file} does not exist: wanted a model folder, or config= with the weights")
    values = io.read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"from_pretrained: {file}: wanted an object, got {type(values).__name__}")
    name = values.get("_class_name", cls.__name__)
    if name != cls.__name__:
        raise ValueError(f"from_pretrained: {file} describes a {name}, wanted a {cls.__name__}")
    fields = {key: value for key, value in values.items() if not key.startswith("_")}
    return loading.load(cls.config_class, fields)


def save_pretrained(
    model: PretrainedModel,
    folder: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write ``config.json`` and the weights into ``folder``, which is created; each file atomically.

    Args:
        model: what to save.
        folder: an older model in it is replaced.
        state: weights to write instead of the model's own, such as their running average; the same names.
        max_shard_bytes: a larger model is split into files of at most this size (one tensor may be larger).

    Raises:
        ValueError: ``state`` has other names than the model, or ``max_shard_bytes`` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"save_pretrained: max_shard_bytes must be at least 1, got {max_shard_bytes}")
    tensors = dict(model.state_dict() if state is None else state)
    if state is not None and (problems := misfits(model.state_dict(), tensors)):
        raise ValueError("save_pretrained: state does not fit the model\n" + "\n".join(problems))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    io.fsync_directory(folder)

    shards = split_into_shards(tensors, max_shard_bytes)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"{STEM}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for stale in set(folder.glob(f"{STEM}*.safetensors*")) - {folder / name for name in names}:
        stale.unlink()
    for name, keys in zip(names, shards, strict=True):
        write_safetensors(folder / name, {key: tensors[key] for key in keys})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(num_bytes(t) for t in tensors.values())},
            "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
        }
        io.write_json(folder / INDEX, index)
    io.write_json(folder / CONFIG, {"_class_name": type(model).__name__, **loading.to_dict(model.config)})


def split_into_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """The names in their order, cut so that no part is larger than ``max_bytes``, unless it is a single tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + num_bytes(tensor) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += num_bytes(tensor)
    return shards


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with io.atomic_path(path) as temporary:
        safetensors().torch.save_file(
            {key: t.detach().contiguous() for key, t in tensors.items()}, temporary, metadata={"format": "pt"}
        )


def load_state_dict(path: str | Path) -> dict[str, Any]:
    """Read what a model folder or one file of weights holds, on the processor and unchanged.

    Safetensors files and current ``.pt`` files are mapped, not read, until their tensors are used. Files of pickles are
    read by PyTorch's restricted unpickler, which builds tensors and plain containers only, and no other way.

    Args:
        path: a folder with safetensors, or one ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file.

    Raises:
        ValueError: nothing to read there, a damaged or unsafe file, or an index that does not match its shards.
    """
    path = Path(path)
    if path.is_dir():
        single, index = (path / WEIGHTS).is_file(), (path / INDEX).is_file()
        if single and index:
            raise ValueError(f"load_state_dict: {path} holds both {WEIGHTS} and {INDEX}: which one is the model?")
        if not single and not index:
            others = [f.name for f in sorted(path.iterdir()) if f.suffix in (*PICKLES, ".safetensors")]
            hint = f"; name one of its files: {', '.join(others[:SHOWN])}" if others else ""
            raise ValueError(f"load_state_dict: {path} has neither {WEIGHTS} nor {INDEX}{hint}")
        return read_sharded(path) if index else read_safetensors(path / WEIGHTS)
    if not path.is_file():
        raise ValueError(f"load_state_dict: {path} does not exist")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in PICKLES:
        return read_pickle(path)
    raise ValueError(f"load_state_dict: {path}: wanted .safetensors, {', '.join(PICKLES)}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    library = safetensors()
    try:
        return library.torch.load_file(path)
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"load_state_dict: {path} is not a readable safetensors file: {error}") from error


def read_sharded(folder: Path) -> dict[str, Tensor]:
    index = io.read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"load_state_dict: {folder / INDEX}: wanted a weight_map of tensor names to file names")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"load_state_dict: {folder / INDEX}: {name!r} is not a safetensors file of this folder")
        shard = read_safetensors(folder / name)
        listed = {key for key, place in places.items() if place == name}
        if problems := misfits(dict.fromkeys(listed), shard):
            raise ValueError(f"load_state_dict: {folder / name} is not what the index says\n" + "\n".join(problems))
        state.update(shard)
    return state


def read_pickle(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNPICKLING_ERRORS as error:
        raise ValueError(f"load_state_dict: {path} is damaged or holds more than tensors: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"load_state_dict: {path}: wanted a map of names to tensors, got {type(state).__name__}")
    return state


def load_into(model: nn.Module, state: Mapping[str, Any], ignore: Iterable[str] = ()) -> None:
    """Load ``state`` into ``model``, all of it or nothing.

    Parameters on the meta device become the tensors of ``state``; others are overwritten, in their own dtype.

    Args:
        model: receives the tensors.
        state: a flat map of names to tensors.
        ignore: shell patterns of names that may stand in ``state`` though the model has none of that name.

    Raises:
        ValueError: missing or unexpected names or other shapes; lists the first ten of each, with the nearest names.
    """
    wanted = model.state_dict()
    patterns = tuple(ignore)
    kept = {k: v for k, v in state.items() if k in wanted or not any(fnmatch.fnmatchcase(k, p) for p in patterns)}
    if problems := misfits(wanted, kept):
        raise ValueError(f"load_into: the weights do not fit {type(model).__name__}\n" + "\n".join(problems))
    model.load_state_dict(kept, assign=any(t.is_meta for t in wanted.values()))


def misfits(wanted: Mapping[str, Tensor | None], given: Mapping[str, Any]) -> list[str]:
    """In what ``given`` differs from ``wanted`` in names and shapes, a paragraph for each kind; empty when it fits."""
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    shapes = []
    for key, tensor in wanted.items():
        value = given.get(key)
        if key in given and not isinstance(value, Tensor):
            shapes.append(f"{key}: wanted a tensor, got {type(value).__name__}")
        elif isinstance(value, Tensor) and tensor is not None and value.shape != tensor.shape:
            shapes.append(f"{key}: wanted {tuple(tensor.shape)}, got {tuple(value.shape)}")
    return [
        *paragraph("missing", [with_nearest(key, unexpected) for key in missing[:SHOWN]], len(missing)),
        *paragraph("unexpected", [with_nearest(key, missing) for key in unexpected[:SHOWN]], len(unexpected)),
        *paragraph("of the wrong shape", shapes[:SHOWN], len(shapes)),
    ]


def with_nearest(key: str, others: list[str]) -> str:
    near = difflib.get_close_matches(key, others, 1)
    return f"{key} (nearest: {near[0]})" if near else key


def paragraph(kind: str, lines: list[str], count: int) -> list[str]:
    more = [f"    and {count - len(lines)} more"] if count > len(lines) else []
    return [f"  {count} {kind}:", *(f"    {line}" for line in lines), *more] if count else []


def safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("weights in safetensors files need safetensors: pip install 'vidgen[models]'") from error
    return safetensors
