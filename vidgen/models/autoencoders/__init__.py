# SPDX-License-Identifier: Apache-2.0
"""Video autoencoders."""

from .cogvideox_vae import AutoencoderKLCogVideoX
from .cogvideox_vae_config import CogVideoXVAEConfig
from .hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from .wfvae import WFVAE, WFVAEOutput
from .wfvae_config import PRESETS, WFVAEConfig, preset

__all__ = [
    "PRESETS",
    "AutoencoderKLCogVideoX",
    "CogVideoXVAEConfig",
    "HunyuanVAE",
    "HunyuanVAEConfig",
    "WFVAE",
    "WFVAEConfig",
    "WFVAEOutput",
    "preset",
]
