# SPDX-License-Identifier: Apache-2.0
"""What is computed once per clip or caption and kept: for data sets small enough to pay for it in disk and memory.

An entry is one safetensors file whose name is a hash of everything that it depends on, so a stale one is never met.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.data.dataset import Clip
from vidgen.io import atomic_path, sha256

Features = dict[str, Tensor]


class FeatureCache:
    """Tensors by key, in memory and in ``folder``. Safe for several processes: entries are written atomically."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        self._memory: dict[str, Features] = {}

    def get(self, key: dict[str, Any], compute: Callable[[], Features]) -> Features:
        """The entry of ``key``, a JSON value that names all that the entry depends on; computed where there is none.

        An unreadable file counts as none and is written again.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if name not in self._memory:
            path = self.folder / f"{name}.safetensors"
            try:
                self._memory[name] = load_file(path)
                self.hits += 1
            except (FileNotFoundError, SafetensorError):
                self.misses += 1
                self._memory[name] = features = compute()
                with atomic_path(path) as temporary:
                    save_file({k: v.contiguous() for k, v in features.items()}, temporary)
        return self._memory[name]


def clip_key(clip: Clip) -> dict[str, Any]:
    """What identifies the pixels of a clip: the file with its size and time of change, and the part of it."""
    status = clip.path.stat()
    return {
        "file": str(clip.path.resolve()),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "part": [clip.start, clip.stop, clip.crop],
    }


def folder_fingerprint(folder: str | Path) -> str:
    """Hash of a model folder's files, tokenizer and all."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and not path.name.startswith("."):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def stack(entries: Sequence[Features]) -> Features:
    """Entries with equal names and shapes as one batch."""
    return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
