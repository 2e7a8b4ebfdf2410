# SPDX-License-Identifier: Apache-2.0
"""Loading a text model and its tokenizer from local folders, through ``transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vidgen import ops
from vidgen.io import read_json

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")


def import_transformers(user: str) -> ModuleType:
    """The library, or an error that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{user} needs transformers: pip install 'vidgen[models]'") from error
    return transformers


def read_config(folder: Path, user: str) -> dict[str, Any]:
    """What a folder's ``config.json`` says.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: it is not an object.
    """
    _require(folder, user, "config.json")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise ValueError(f"{user}: {folder / 'config.json'} must hold an object, got {type(values).__name__}")
    return values


def load_model(model_class: Any, folder: Path, user: str) -> Any:
    """A model of ``model_class`` from ``config.json`` and safetensors weights; no network, no pickle.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: the weights do not fill the model.
    """
    _require(folder, user, "config.json")
    if not any(folder.glob("*.safetensors")):
        other = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
        raise FileNotFoundError(
            f"{user}: {folder} has {other} but no *.safetensors; load it once with transformers where you trust the "
            "file and call save_pretrained"
        )
    model, report = model_class.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        # transformers would fill these with random numbers and only warn
        raise ValueError(f"{user}: weights in {folder} lack {len(missing)} tensors: {', '.join(missing[:10])}")
    for module in model.modules():
        if type(module).__name__ == "GELUActivation":  # by PyTorch's F.gelu, which is not exact on every device
            module.act = ops.gelu
    return model


def load_tokenizer(folder: Path, user: str) -> Any:
    """The tokenizer of a folder.

    Raises:
        FileNotFoundError: none of the files that tokenizers are stored in.
    """
    _require(folder, user)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{user}: {folder} has no tokenizer, none of {', '.join(TOKENIZER_FILES)}")
    return import_transformers(user).AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def tokenize(tokenizer: Any, captions: Sequence[str], max_length: int, user: str) -> Any:
    """``input_ids`` and ``attention_mask``, each ``(batch, max_length)`` int64: truncated and padded to the length.

    Raises:
        ValueError: no captions, or something that is not a string.
    """
    if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{user}.encode: captions must be a non-empty list of strings, got {captions!r}")
    return tokenizer(list(captions), max_length=max_length, padding="max_length", truncation=True, return_tensors="pt")


def _require(folder: Path, user: str, *names: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{user}: {folder} is not a folder")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{user}: {folder} has no {name}")
