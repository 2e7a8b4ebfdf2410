# SPDX-License-Identifier: Apache-2.0
"""CogVideoX 1.0 and 1.5: the joint text and video transformer of 2B, 5B and its image-to-video models."""

from .config import PRESETS, CogVideoXConfig, preset
from .model import CogVideoXTransformer3DModel

__all__ = ["PRESETS", "CogVideoXConfig", "CogVideoXTransformer3DModel", "preset"]
