# SPDX-License-Identifier: Apache-2.0
"""Configuration of the WFVAE, in the field names of Open-Sora Plan v1.5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen import config as loading

# fmt: off
RELEASED_SCALE = (
    0.7031, 0.7109, 1.5391, 1.2969, 0.7109, 1.4141, 1.3828, 2.1719, 1.7266, 1.8281, 1.9141, 1.2031, 0.6875, 0.9609,
    1.6484, 1.1875, 1.5312, 1.1328, 0.8828, 0.6836, 0.8828, 0.9219, 1.6953, 1.4453, 1.5312, 0.6836, 0.7656, 0.8242,
    1.2344, 1.0312, 1.7266, 0.9492,
)
RELEASED_SHIFT = (
    -0.2129, 0.1226, 1.6328, 0.6211, -0.8750, 0.6172, -0.5703, 0.1348, -0.2178, -0.9375, 0.3184, 0.3281, -0.0544,
    -0.1826, -0.2812, 0.4355, 0.1621, -0.2578, 0.7148, -0.7422, -0.2295, -0.2324, -1.4922, 0.6328, 1.1250, -0.2578,
    -2.1094, 1.0391, 1.1797, -1.2422, -0.2988, -0.9570,
)
# fmt: on

# The original's switches, each with the one value that makes the 8x8x8 model.
REQUIRED_SWITCHES = {
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
    "l1_downsample_block": "Spatial2xTime2x3DDownsample",
    "l2_downsample_block": "Spatial2xTime2x3DDownsample",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l2_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
OPTIONAL_SWITCHES = {"model_id": "wfvae", "dropout": 0.0, "vae_scale_factor": [8, 8, 8]}
# How the original runs the model, not what it is.
WITHOUT_EFFECT = {"use_tiling", "from_pretrained", "dtype"}
MISSPELLED = {"l1_dowmsample_block": "l1_downsample_block", "l2_dowmsample_block": "l2_downsample_block"}


@dataclass(frozen=True)
class WFVAEConfig:
    """Sizes of the 8x8x8 WFVAE; the defaults are the release's, but for the statistics of its latents.

    Args:
        latent_dim: channels of the latent. The encoder returns twice as many moments.
        base_channels: width after the first convolution; the deepest level is four times as wide.
        encoder_num_resblocks, decoder_num_resblocks: residual blocks of each level; the decoder needs one.
        encoder_energy_flow_hidden_size, decoder_energy_flow_hidden_size: width of the paths between the wavelet bands
            and the backbone.
        connect_res_layer_num: residual blocks of each such path in the decoder.
        use_attention: attention within each frame at the deepest level.
        scale, shift: for each latent channel, ``latent = (sample - shift) * scale``; empty means 1 and 0.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    latent_dim: int = 32
    base_channels: int = 160
    encoder_num_resblocks: int = 2
    decoder_num_resblocks: int = 2
    encoder_energy_flow_hidden_size: int = 128
    decoder_energy_flow_hidden_size: int = 128
    connect_res_layer_num: int = 1
    use_attention: bool = True
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "shift", tuple(self.shift))
        if problems := self.problems():
            raise ValueError("WFVAEConfig: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        least = {
            "latent_dim": 1,
            "base_channels": 1,
            "encoder_num_resblocks": 0,
            "decoder_num_resblocks": 1,
            "encoder_energy_flow_hidden_size": 1,
            "decoder_energy_flow_hidden_size": 1,
            "connect_res_layer_num": 0,
        }
        found = [f"{name} must be at least {n}, got {v}" for name, n in least.items() if (v := getattr(self, name)) < n]
        for name in ("scale", "shift"):
            count = len(getattr(self, name))
            if count not in (0, self.latent_dim):
                found.append(f"{name} must have latent_dim={self.latent_dim} values or none, got {count}")
        if 0 in self.scale:
            found.append("scale must not be 0 in any channel")
        return found

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> WFVAEConfig:
        """Read the ``ae`` section of an Open-Sora Plan v1.5 model JSON, ``l1_dowmsample_block`` and all.

        Raises:
            ValueError: lists unknown and absent fields, and those that make another variant than 8x8x8.
        """
        values = {MISSPELLED.get(name, name): value for name, value in original.items()}
        needed = [*(field.name for field in dataclasses.fields(cls)), *REQUIRED_SWITCHES]
        problems = [f"{name} is missing" for name in needed if name not in values]
        switches = {**REQUIRED_SWITCHES, **OPTIONAL_SWITCHES}
        for name, wanted in switches.items():
            if name in values and values[name] != wanted:
                problems.append(f"{name} must be {wanted!r}, got {values[name]!r}")
        kept = {k: v for k, v in values.items() if k not in switches and k not in WITHOUT_EFFECT}
        try:
            result = loading.load(cls, kept)
        except loading.ConfigError as error:
            problems += error.problems
        if problems:
            raise ValueError("WFVAEConfig.from_original: " + "; ".join(problems))
        return result


PRESETS = {
    # 227,035,816 parameters, of which 192 are the frozen wavelet taps of the encoder
    "released": WFVAEConfig(scale=RELEASED_SCALE, shift=RELEASED_SHIFT),
    # Trains on two processor cores in minutes
    "small": WFVAEConfig(
        latent_dim=8,
        base_channels=16,
        encoder_num_resblocks=1,
        decoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=16,
        decoder_energy_flow_hidden_size=16,
    ),
    # The smallest that has every part, for tests
    "tiny": WFVAEConfig(
        latent_dim=4,
        base_channels=4,
        encoder_num_resblocks=1,
        decoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=4,
        decoder_energy_flow_hidden_size=4,
    ),
}


def preset(name: str, **changes: Any) -> WFVAEConfig:
    """A named configuration, with fields changed: ``preset("small", latent_dim=16)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
