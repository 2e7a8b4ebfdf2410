# SPDX-License-Identifier: Apache-2.0
"""The library of Ascend C kernels, ``vidgen/_ascendc.so``, built from npu_kernels/ where CANN is."""

from __future__ import annotations

import json
from pathlib import Path

import torch

BUILT = Path(__file__).parents[3] / "_ascendc.so"

# Why there are no kernels, or None once they are loaded.
status: str | None = "the library of Ascend C kernels was not looked for yet"


def find() -> str | None:
    """Load the library beside the package, if it was built for this PyTorch; says why not, or None."""
    global status
    record = BUILT.with_suffix(".build.json")
    if status is None:
        return None
    if not BUILT.exists() or not record.exists():
        status = f"the Ascend C kernels are not built ({BUILT.name}); see npu_kernels/README.md"
    elif (built := json.loads(record.read_text())["torch"]) != torch.__version__:
        # Loading a library of another PyTorch can end the process.
        status = f"{BUILT.name} is built for torch {built}, this is torch {torch.__version__}"
    else:
        try:
            load(BUILT)
        except OSError as error:
            status = f"{BUILT.name} cannot be loaded: {error}"
    return status


def load(path: Path) -> None:
    """Load the operators ``vidgen_ascendc::*`` from a library built for this PyTorch."""
    global status
    torch.ops.load_library(str(path))
    status = None
