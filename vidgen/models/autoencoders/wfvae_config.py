# SPDX-License-Identifier: Apache-2.0
"""Configuration of the WFVAE, in the field names of Open-Sora Plan v1.3 and v1.5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

SCALE_4X8X8 = 0.18215  # of every channel of the released 4x8x8 model; shift 0

# The original's switches, with the values that make the two models there are: blocks of level 1 that treat frames apart
# or together.
LEVEL_1_SWITCHES = {
    (8, 8, 8): {
        "l1_downsample_block": "Spatial2xTime2x3DDownsample",
        "l1_upsample_block": "Spatial2xTime2x3DUpsample",
        "l1_downsample_wavelet": "HaarWaveletTransform3D",
        "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
    },
    (4, 8, 8): {
        "l1_downsample_block": "Downsample",
        "l1_upsample_block": "Upsample",
        "l1_downsample_wavelet": "HaarWaveletTransform2D",
        "l1_upsample_wavelet": "InverseHaarWaveletTransform2D",
    },
}
LEVEL_2_SWITCHES = {
    "l2_downsample_block": "Spatial2xTime2x3DDownsample",
    "l2_upsample_block": "Spatial2xTime2x3DUpsample",
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
OPTIONAL_SWITCHES = {"model_id": "wfvae", "dropout": 0.0, "attention_type": "AttnBlock3DFix"}
GROUPS = 32  # of the norms of kind groupnorm
# How the original runs the model, not what it is.
WITHOUT_EFFECT = {"use_tiling", "from_pretrained", "dtype"}
MISSPELLED = {"l1_dowmsample_block": "l1_downsample_block", "l2_dowmsample_block": "l2_downsample_block"}


@dataclass(frozen=True)
class WFVAEConfig:
    """Sizes of a WFVAE; the defaults are those of the 8x8x8 release, but for the statistics of its latents.

    Args:
        latent_dim: channels of the latent. The encoder returns twice as many moments.
        base_channels: width after the first convolution; the deepest level is four times as wide.
        encoder_num_resblocks, decoder_num_resblocks: residual blocks of each level; the decoder needs one.
        encoder_energy_flow_hidden_size, decoder_energy_flow_hidden_size: width of the paths between the wavelet bands
            and the backbone.
        connect_res_layer_num: residual blocks of each such path in the decoder.
        use_attention: attention within each frame at the deepest level.
        scale, shift: for each latent channel, ``latent = (sample - shift) * scale``; empty means 1 and 0.
        vae_scale_factor: frames, rows and columns for each of the latent's: (8, 8, 8) or (4, 8, 8).
        norm_type: ``"layernorm"`` over channels, or ``"groupnorm"`` over whole videos, which has no exact chunks.
        t_interpolation: how frames are doubled, ``"trilinear"`` or ``"nearest"``.

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
    vae_scale_factor: tuple[int, int, int] = (8, 8, 8)
    norm_type: Literal["layernorm", "groupnorm"] = "layernorm"
    t_interpolation: Literal["trilinear", "nearest"] = "trilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vae_scale_factor", tuple(self.vae_scale_factor))
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
        if self.vae_scale_factor not in LEVEL_1_SWITCHES:
            found.append(f"vae_scale_factor must be one of {list(LEVEL_1_SWITCHES)}, got {self.vae_scale_factor}")
        for name, choices in (
            ("norm_type", ("layernorm", "groupnorm")),
            ("t_interpolation", ("trilinear", "nearest")),
        ):
            if (value := getattr(self, name)) not in choices:
                found.append(f"{name} must be one of {choices}, got {value!r}")
        if self.norm_type == "groupnorm":
            widths = ("base_channels", "encoder_energy_flow_hidden_size", "decoder_energy_flow_hidden_size")
            found += [
                f"{name} must be a multiple of {GROUPS} for norm_type='groupnorm', got {value}"
                for name in widths
                if (value := getattr(self, name)) % GROUPS
            ]
        if 0 in self.scale:
            found.append("scale must not be 0 in any channel")
        return found

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> WFVAEConfig:
        """Read the ``ae`` section of an Open-Sora Plan v1.5 model JSON, or the ``config.json`` of a v1.3 VAE.

        Raises:
            ValueError: lists unknown and absent fields, and switches that make neither of the two models.
        """
        values = {MISSPELLED.get(name, name): value for name, value in original.items() if not name.startswith("_")}
        flat = values.get("l1_downsample_wavelet") == LEVEL_1_SWITCHES[4, 8, 8]["l1_downsample_wavelet"]
        factor = (4, 8, 8) if flat else (8, 8, 8)
        required = {**LEVEL_1_SWITCHES[factor], **LEVEL_2_SWITCHES}
        needed = [*(field.name for field in dataclasses.fields(cls) if field.name != "vae_scale_factor"), *required]
        problems = [f"{name} is missing" for name in needed if name not in values]
        switches = {**required, **OPTIONAL_SWITCHES, "vae_scale_factor": list(factor)}
        for name, wanted in switches.items():
            if name in values and values[name] != wanted:
                problems.append(f"{name} must be {wanted!r}, got {values[name]!r}")
        kept = {k: v for k, v in values.items() if k not in switches and k not in WITHOUT_EFFECT}
        try:
            result = loading.load(cls, {**kept, "vae_scale_factor": list(factor)})
        except loading.ConfigError as error:
            problems += error.problems
        if problems:
            raise ValueError("WFVAEConfig.from_original: " + "; ".join(problems))
        return result


PRESETS = {
    # 227,035,816 parameters, of which 192 are the frozen wavelet taps of the encoder
    "released": WFVAEConfig(scale=RELEASED_SCALE, shift=RELEASED_SHIFT),
    # Open-Sora Plan v1.3
    "released_4x8x8": WFVAEConfig(
        latent_dim=8,
        base_channels=128,
        encoder_energy_flow_hidden_size=64,
        connect_res_layer_num=2,
        scale=(SCALE_4X8X8,) * 8,
        shift=(0.0,) * 8,
        vae_scale_factor=(4, 8, 8),
    ),
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
    "small_4x8x8": WFVAEConfig(
        latent_dim=8,
        base_channels=16,
        encoder_num_resblocks=1,
        decoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=16,
        decoder_energy_flow_hidden_size=16,
        vae_scale_factor=(4, 8, 8),
    ),
    "tiny_4x8x8": WFVAEConfig(
        latent_dim=4,
        base_channels=4,
        encoder_num_resblocks=1,
        decoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=4,
        decoder_energy_flow_hidden_size=4,
        vae_scale_factor=(4, 8, 8),
    ),
}


def preset(name: str, **changes: Any) -> WFVAEConfig:
    """A named configuration, with fields changed: ``preset("small", latent_dim=16)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
