# SPDX-License-Identifier: Apache-2.0
"""Video autoencoders."""

from .wfvae import WFVAE, WFVAEOutput
from .wfvae_config import PRESETS, WFVAEConfig, preset

__all__ = ["PRESETS", "WFVAE", "WFVAEConfig", "WFVAEOutput", "preset"]
