# SPDX-License-Identifier: Apache-2.0
"""Ascend C kernels of our own, for ops that torch_npu has no fused operator for. Their sources are in npu_kernels/."""

from __future__ import annotations

from ..._registry import OPS, Backend
from . import _library
from .kernels import KERNELS


def register(device: str) -> None:
    _library.find()
    for kernel in KERNELS.values():
        OPS[kernel.op].add_backend(device, Backend("npu_ascendc", kernel.run, kernel.refuse))
