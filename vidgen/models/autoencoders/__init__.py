# SPDX-License-Identifier: Apache-2.0
"""Video autoencoders."""

from .hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from .wfvae import WFVAE, WFVAEOutput
from .wfvae_config import PRESETS, WFVAEConfig, preset

__all__ = ["PRESETS", "HunyuanVAE", "HunyuanVAEConfig", "WFVAE", "WFVAEConfig", "WFVAEOutput", "preset"]
