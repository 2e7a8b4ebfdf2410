# SPDX-License-Identifier: Apache-2.0
"""Open-Sora Plan v1.3: the text-to-video transformer with Skiparse attention, and its variant that fills in frames."""

from .config import PRESETS, OpenSoraConfig, OpenSoraInpaintConfig, preset
from .model import OpenSoraInpaint_v1_3, OpenSoraT2V_v1_3

__all__ = ["PRESETS", "OpenSoraConfig", "OpenSoraInpaintConfig", "OpenSoraInpaint_v1_3", "OpenSoraT2V_v1_3", "preset"]
