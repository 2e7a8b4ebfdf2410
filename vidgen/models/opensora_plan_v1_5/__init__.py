# SPDX-License-Identifier: Apache-2.0
"""Open-Sora Plan v1.5: the SparseUMMDiT video transformer."""

from .config import PRESETS, SparseUMMDiTConfig, preset
from .model import SparseUMMDiT

__all__ = ["PRESETS", "SparseUMMDiT", "SparseUMMDiTConfig", "preset"]
