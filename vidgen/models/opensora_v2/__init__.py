# SPDX-License-Identifier: Apache-2.0
"""Open-Sora 2.0: the MMDiT video transformer."""

from .checkpoint import to_release_layout
from .config import PRESETS, MMDiTConfig, preset
from .model import MMDiT

__all__ = ["PRESETS", "MMDiT", "MMDiTConfig", "preset", "to_release_layout"]
