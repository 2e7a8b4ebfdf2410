# SPDX-License-Identifier: Apache-2.0
"""Configuration of the CogVideoX VAE, in the field names of its diffusers folders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

DOWN_BLOCK, UP_BLOCK = "CogVideoXDownBlock3D", "CogVideoXUpBlock3D"

# Fields of the original that have one value in every release.
CONSTANTS: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class CogVideoXVAEConfig:
    """Sizes of the VAE; the defaults are those of 2B. One set of weights serves every release.

    Args:
        in_channels, out_channels: of the video.
        down_block_types, up_block_types: one name for each level; there is one kind of each.
        block_out_channels: width of each level, from the pixels down. Each level but the last halves the size.
        latent_channels: of the latent; the encoder returns twice as many moments.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        norm_eps: of the norms in the encoder's residual blocks; the others have 1e-6.
        norm_num_groups: of every GroupNorm; divides every width.
        temporal_compression_ratio: a power of 2; the first levels halve time too, as many as make it up.
        sample_height, sample_width: trained size, whose halves are the tiles of diffusers.
        scaling_factor: the transformer's latent is this times the VAE's: 1.15258426 for 2B, 0.7 for the others.
        force_upcast: kept for diffusers, without effect.
        invert_scale_latents: the image of an image-to-video model is divided by the factor instead (1.5).
        act_fn, shift_factor, latents_mean, latents_std, use_quant_conv, use_post_quant_conv: have the one value that
            every release has.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN_BLOCK,) * 4
    up_block_types: tuple[str, ...] = (UP_BLOCK,) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if problems := self.problems():
            raise ValueError("CogVideoXVAEConfig: " + "; ".join(problems))

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time_levels(self) -> int:
        """Levels that halve time."""
        return self.temporal_compression_ratio.bit_length() - 1

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        positive = (
            "in_channels",
            "out_channels",
            "latent_channels",
            "layers_per_block",
            "norm_num_groups",
            "sample_height",
            "sample_width",
        )
        found = [f"{name} must be at least 1, got {v}" for name in positive if (v := getattr(self, name)) < 1]
        found += [
            f"{name} must be {wanted!r}, got {getattr(self, name)!r}"
            for name, wanted in CONSTANTS.items()
            if getattr(self, name) != wanted
        ]
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or any(width < 1 or (groups > 0 and width % groups) for width in widths):
            found.append(f"block_out_channels must be multiples of norm_num_groups={groups}, got {list(widths)}")
        for name, block in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
            if getattr(self, name) != (block,) * len(widths):
                found.append(f"{name} must be {len(widths)} times {block!r}, got {list(getattr(self, name))}")
        ratio = self.temporal_compression_ratio
        if ratio < 1 or ratio & (ratio - 1) or ratio > self.pixels_per_latent:
            found.append(
                f"temporal_compression_ratio must be a power of 2 up to {self.pixels_per_latent} (of as many levels as "
                f"halve the size), got {ratio}"
            )
        if not self.norm_eps > 0:
            found.append(f"norm_eps must be positive, got {self.norm_eps}")
        if not self.scaling_factor > 0:
            found.append(f"scaling_factor must be positive, got {self.scaling_factor}")
        return found


PRESETS = {
    # 215,583,907 parameters in 436 tensors, all three
    "2b": CogVideoXVAEConfig(),
    "5b": CogVideoXVAEConfig(scaling_factor=0.7),
    "1.5-i2v": CogVideoXVAEConfig(scaling_factor=0.7, invert_scale_latents=True),
    # The smallest that has every part, for tests
    "tiny": CogVideoXVAEConfig(
        block_out_channels=(8, 16, 16, 24),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=48,
    ),
}


def preset(name: str, **changes: Any) -> CogVideoXVAEConfig:
    """A named configuration, with fields changed: ``preset("tiny", scaling_factor=0.7)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
