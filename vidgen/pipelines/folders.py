# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a model lie, and which system it belongs to.

A checkpoint of a run says so in its ``pipeline.json``; a model folder in diffusers' layout by its subfolders
``transformer``, ``vae``, ``text_encoder`` (T5 or mT5) and ``text_encoder_2`` (CLIP), with ``tokenizer`` and
``tokenizer_2``, and by the name of its transformer's class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vidgen import config
from vidgen.checkpoints.distributed import is_distributed
from vidgen.io import newest_valid, read_json, write_json

T = TypeVar("T")

PIPELINE = "pipeline.json"
ADAPTERS = "adapter_config.json"
PARTS = ("transformer", "vae", "t5", "clip", "lora")
LAYOUT = {"transformer": "transformer", "vae": "vae", "t5": "text_encoder", "clip": "text_encoder_2"}
TOKENIZERS = {"t5": "tokenizer", "clip": "tokenizer_2"}
# The class of the transformer, as its config.json names it, and the system that it belongs to.
CLASSES = {
    "OpenSoraT2V_v1_3": "opensora_plan_v1_3",
    "OpenSoraInpaint_v1_3": "opensora_plan_v1_3",
    "SparseUMMDiT": "opensora_plan_v1_5",
    "MMDiT": "opensora_v2",
    "CogVideoXTransformer3DModel": "cogvideox",
}
# The parts beside the transformer that a system needs.
NEEDED = {
    "opensora_plan_v1_3": ("vae", "t5"),
    "opensora_plan_v1_5": ("vae", "t5", "clip"),
    "opensora_v2": ("vae", "t5", "clip"),
    "cogvideox": ("vae", "t5"),
}


@dataclass
class Parts:
    """Folders of the parts, and what the transformer was trained on; the defaults are those of Open-Sora Plan 1.5."""

    transformer: Path
    vae: Path | None = None
    t5: Path | None = None
    clip: Path | None = None
    lora: Path | None = None  # adapters for the transformer, in peft's files
    system: str = "opensora_plan_v1_5"
    num_frames: int = 121
    height: int = 576
    width: int = 1024
    fps: float = 24.0
    t5_max_length: int = 512
    clip_max_length: int = 77
    prompt_prefix: str = "high quality, "
    motion_score: int | None = 4  # said at the end of the prompts of Open-Sora 2.0

    def tokenizer(self, name: str) -> Path | None:
        """Folder of the tokenizer of "t5" or "clip": one of its own, or None where it lies with the encoder."""
        encoder = getattr(self, name)
        own = encoder.parent / TOKENIZERS[name]
        return own if encoder.name == LAYOUT[name] and own.is_dir() else None


def find_parts(model: str | Path, **given: Path | None) -> Parts:
    """The parts of a model: a run (its newest good checkpoint), a checkpoint, or a model folder.

    Args:
        given: folders of ``vae``, ``t5``, ``clip`` and ``lora`` (adapters, or the run that trained them) to use instead
            of the model's own.

    Raises:
        ValueError: no such folder, nothing in it that is known, or a part that is missing.
    """
    model = Path(model)
    if not model.is_dir():
        raise ValueError(f"model: {model} is not a folder")
    checkpoint = model if (model / PIPELINE).is_file() else newest_valid(model)
    if checkpoint is not None and (checkpoint / PIPELINE).is_file():
        parts = _read(checkpoint)
        if not parts.transformer.is_dir() and is_distributed(checkpoint):
            raise ValueError(f"model: {_only_shards(checkpoint)}")
    elif (model / LAYOUT["transformer"] / "config.json").is_file():
        found = {name: model / folder for name, folder in LAYOUT.items() if (model / folder).is_dir()}
        parts = _with_folders(released(model / LAYOUT["transformer"]), found)
    elif (model / "config.json").is_file():
        parts = released(model)
    else:
        raise ValueError(f"model: {model} holds no checkpoint, no {LAYOUT['transformer']} folder and no config.json")
    parts = _with_folders(parts, {name: path for name, path in given.items() if path is not None})
    if parts.system not in NEEDED:
        raise ValueError(f"model: {model}: wanted a system of {', '.join(NEEDED)}, got {parts.system!r}")
    for name in NEEDED[parts.system]:
        if getattr(parts, name) is None:
            raise ValueError(f"model: {model} does not say where its {name} lies; give --{name} FOLDER")
        if not getattr(parts, name).is_dir():
            raise ValueError(f"model: the folder of its {name}, {getattr(parts, name)}, does not exist; give --{name}")
    assert parts.vae is not None
    lora = None if parts.lora is None else adapters_folder(parts.lora)
    return replace(parts, vae=weights_folder(parts.vae), lora=lora)


def released(transformer: Path) -> Parts:
    """A transformer alone, with what its system was released with. Raises ValueError for an unknown class."""
    values = read_json(transformer / "config.json")
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name not in CLASSES:
        raise ValueError(f"model: {transformer / 'config.json'}: wanted _class_name {', '.join(CLASSES)}, got {name!r}")
    parts = Parts(transformer, system=CLASSES[name])
    if parts.system == "opensora_plan_v1_3":
        prefix, fps = "high quality, high aesthetic, ", 16.0 if name == "OpenSoraT2V_v1_3" else 18.0
        return replace(parts, num_frames=93, height=352, width=640, fps=fps, prompt_prefix=prefix)
    if parts.system == "opensora_v2":
        return replace(parts, num_frames=129, height=192, width=336, prompt_prefix="")
    if parts.system == "cogvideox":
        tokens = values.get("max_text_seq_length", 226)
        parts = replace(parts, t5_max_length=tokens, prompt_prefix="")
        if values.get("patch_size_t") is not None:  # 1.5 takes any size; its sample_height and sample_width bound it
            return replace(parts, num_frames=81, height=768, width=1360, fps=16.0)
        cells = values.get("sample_height", 60), values.get("sample_width", 90)
        frames = values.get("sample_frames", 49)
        return replace(parts, num_frames=frames, height=8 * cells[0], width=8 * cells[1], fps=8.0)
    return parts


def _read(folder: Path) -> Parts:
    values: dict[str, Any] = read_json(folder / PIPELINE)
    parts = config.load(Parts, values)
    found = {name: folder / path for name in PARTS if (path := getattr(parts, name)) is not None}
    return _with_folders(parts, {name: Path(os.path.normpath(path)) for name, path in found.items()})


def _with_folders(parts: Parts, folders: Mapping[str, Path]) -> Parts:
    changes: dict[str, Any] = dict(folders)
    return replace(parts, **changes)


def write_parts(parts: Parts, folder: Path) -> None:
    """Write ``pipeline.json`` into ``folder``, with paths relative to it, so that a tree of runs can be moved."""
    relative = {
        name: Path(os.path.relpath(path, folder.resolve())) if path.is_absolute() else path
        for name in PARTS
        if (path := getattr(parts, name)) is not None
    }
    write_json(folder / PIPELINE, config.to_dict(_with_folders(parts, relative)))


def weights_folder(path: str | Path, part: str = "ema") -> Path:
    """The model folder that ``path`` stands for: itself, or the newest good checkpoint of that run.

    Of a checkpoint the averaged weights are taken, or the trained ones where it keeps no average.

    Raises:
        ValueError: there is no model.
    """
    path = Path(path)
    newest = newest_valid(path)
    for folder in (path, newest):
        for candidate in (folder, folder / part, folder / "model") if folder is not None else ():
            if (candidate / "config.json").is_file():
                return candidate
    for folder in (path, newest):
        if folder is not None and is_distributed(folder):
            raise ValueError(_only_shards(folder))
    raise ValueError(f"{path}: no model there, and no run with a checkpoint")


def adapters_folder(path: Path) -> Path:
    """The folder of adapters that ``path`` stands for: itself, or that of the newest good checkpoint of that run.

    Raises:
        ValueError: there are none.
    """
    newest = newest_valid(path) if path.is_dir() else None
    for folder in (path, newest):
        for candidate in (folder, folder / "ema", folder / "model") if folder is not None else ():
            if (candidate / ADAPTERS).is_file():
                return candidate
    raise ValueError(f"lora: {path}: no {ADAPTERS} there, and no run with a checkpoint that has one")


def _only_shards(checkpoint: Path) -> str:
    return (
        f"{checkpoint} is a checkpoint in the middle of a run of many processes, which holds shards and no model "
        f"folder: write one with vidgen convert {checkpoint} FOLDER --to hf --ema"
    )


def needed(value: T | None) -> T:
    """A value that is known to be there, such as a part after `find_parts`."""
    assert value is not None
    return value
