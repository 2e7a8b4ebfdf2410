# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled kernels, if they were built and built for this PyTorch.

``status`` is None when they are loaded, else the reason why they are not.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path

import torch

_REBUILD = "rebuild with: pip install --no-build-isolation -e ."


def _load() -> str | None:
    if os.environ.get("VIDGEN_NATIVE") == "0":
        return "switched off by VIDGEN_NATIVE=0"
    package = Path(__file__).parent.parent
    record = package / "_C.build.json"
    if not record.exists():
        return f"not built; {_REBUILD}"
    built = json.loads(record.read_text())
    library = package / built["library"]
    if built["torch"] != torch.__version__:
        reason = f"built for torch {built['torch']}, this is torch {torch.__version__}; {_REBUILD}"
    elif not library.exists() or library.stat().st_size != built["bytes"]:
        # Loading a truncated library can end the process.
        reason = f"{library.name} is missing or incomplete; {_REBUILD}"
    else:
        try:
            importlib.import_module("vidgen._C")
            return None
        except ImportError as error:
            reason = f"{error}; {_REBUILD}"
    warnings.warn(f"vidgen: the compiled kernels are not used: {reason}", stacklevel=2)
    return reason


def cpu_capability() -> str:
    """The instruction set that CPU kernels use in this process; PyTorch's where they are not loaded."""
    if status is None:
        return str(importlib.import_module("vidgen._C").cpu_capability())
    return torch.backends.cpu.get_cpu_capability()


status: str | None = _load()
