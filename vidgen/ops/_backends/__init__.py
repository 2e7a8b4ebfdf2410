# SPDX-License-Identifier: Apache-2.0
"""Implementations for accelerators, imported when a tensor of their device first reaches an op.

Each folder here is one backend. Its ``register(device)`` gives the ops their implementations with
:meth:`Op.add_backend`, also where the library it needs is missing: those refuse and say so.
"""

from __future__ import annotations

import importlib

# Best first; PyTorch's own operators (composite) and the reference come last by themselves.
CHAINS = {
    "cpu": ("triton",),  # in Triton's interpreter only: see ops/__init__.py
    "cuda": ("cuda", "strided_copies", "triton"),
    "npu": ("ascendc", "npu", "strided_copies", "triton"),
}


def register(device: str) -> None:
    for folder in CHAINS.get(device, ()):
        importlib.import_module(f".{folder}", __name__).register(device)
