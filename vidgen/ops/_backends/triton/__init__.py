# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: one source for CUDA and, through triton-ascend, for Ascend.

They keep to what Triton 3.2 knows: no inline assembly, no descriptors, no selection between pointers. How blocks are
sized on each device stands in :mod:`._tuning`.
"""

from __future__ import annotations

import importlib
import importlib.util

from ..._registry import OPS, Backend

# op: module here. A module holds the op's implementation under the op's name, and `<op>_refuses` beside it.
MODULES: dict[str, str] = {}


def register(device: str) -> None:
    reason = None if importlib.util.find_spec("triton") else "triton is not installed"
    for op, name in MODULES.items():
        if reason is not None:
            OPS[op].add_backend(device, Backend("triton", OPS[op].reference, lambda *args, why=reason: why))
            continue
        module = importlib.import_module(f".{name}", __name__)
        OPS[op].add_backend(device, Backend("triton", getattr(module, op), getattr(module, f"{op}_refuses")))
