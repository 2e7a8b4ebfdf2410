# SPDX-License-Identifier: Apache-2.0
"""Configuration of the HunyuanVideo autoencoder, in the field names of Open-Sora 2.0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen import config as loading

TIME_RATIO = 4
DIFFUSERS_CLASS = "AutoencoderKLHunyuanVideo"


@dataclass(frozen=True)
class HunyuanVAEConfig:
    """Sizes of the 4x8x8 autoencoder and how it is tiled; the defaults are the release's.

    Args:
        in_channels, out_channels: of the video.
        latent_channels: of the latent; the encoder returns twice as many moments.
        block_out_channels: width of each level of the encoder, at least three; the decoder has them in reverse.
        layers_per_block: residual blocks of each level of the encoder; the decoder has one more.
        norm_num_groups: groups of every norm; divides every width.
        time_compression_ratio: frames in a latent frame; only 4 exists.
        spatial_compression_ratio: pixels along a side of a latent cell; a power of two.
        mid_block_add_attention: attention between the two middle blocks.
        scale_factor, shift_factor: ``latent = scale_factor * (sample - shift_factor)``.
        use_spatial_tiling: frames with a side above ``sample_size`` are coded in tiles of that size.
        use_temporal_tiling: videos of more than ``sample_tsize`` frames are coded in tiles of ``sample_tsize + 1``.
        sample_size: side of a tile in pixels.
        sample_tsize: frames of a tile.
        tile_overlap_factor: part of a tile that is blended with the tile before.
        allow_misaligned_tiles: accept sizes whose tiles do not line up, as the original does: the results then have
            gaps or repetitions, and other sizes.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    time_compression_ratio: int = TIME_RATIO
    spatial_compression_ratio: int = 8
    mid_block_add_attention: bool = True
    scale_factor: float = 0.476986
    shift_factor: float = 0.0
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    sample_size: int = 256
    sample_tsize: int = 64
    tile_overlap_factor: float = 0.25
    allow_misaligned_tiles: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if problems := self.problems():
            raise ValueError("HunyuanVAEConfig: " + "; ".join(problems))

    @property
    def latent_size(self) -> int:
        """Side of a tile in the latent."""
        return int(self.sample_size / 2 ** (len(self.block_out_channels) - 1))

    @property
    def latent_tsize(self) -> int:
        """Frames of a tile in the latent."""
        return self.sample_tsize // self.time_compression_ratio

    @property
    def strides(self) -> list[tuple[int, int, int]]:
        """By how much each level divides frames, height and width; (1, 1, 1) where it does not."""
        levels = range(len(self.block_out_channels))
        halvings = self.spatial_compression_ratio.bit_length() - 1
        times = [levels[-1] - 2 <= i < levels[-1] for i in levels]
        return [(1 + time, 1 + (i < halvings), 1 + (i < halvings)) for i, time in enumerate(times)]

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        positive = ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_size", "sample_tsize")
        found = [f"{name} must be at least 1, got {v}" for name in positive if (v := getattr(self, name)) < 1]
        if found:
            return found
        widths, ratio = self.block_out_channels, self.spatial_compression_ratio
        if len(widths) < 3 or any(width < 1 or width % self.norm_num_groups for width in widths):
            found.append(
                f"block_out_channels must be at least three multiples of norm_num_groups={self.norm_num_groups}, "
                f"got {list(widths)}"
            )
        if self.layers_per_block < 0:
            found.append(f"layers_per_block must not be negative, got {self.layers_per_block}")
        if self.time_compression_ratio != TIME_RATIO:
            found.append(f"time_compression_ratio must be {TIME_RATIO}, got {self.time_compression_ratio}")
        if ratio < 1 or ratio & (ratio - 1) or ratio > 2 ** len(widths):
            found.append(f"spatial_compression_ratio must be a power of two that the levels reach, got {ratio}")
        if self.scale_factor == 0:
            found.append("scale_factor must not be 0")
        return found or [
            *(self.tile_problems("sample_size", self.latent_size, ratio) if self.use_spatial_tiling else []),
            *(self.tile_problems("sample_tsize", self.latent_tsize, TIME_RATIO) if self.use_temporal_tiling else []),
        ]

    def tile_problems(self, name: str, latent: int, ratio: int) -> list[str]:
        """Tiles must advance by as much as is kept of them, in pixels and in the latent, or the result has gaps."""
        sample, overlap = getattr(self, name), self.tile_overlap_factor
        if not 0 <= overlap < 1:
            return [f"tile_overlap_factor must lie in [0, 1), got {overlap}"]
        advance = (int(sample * (1 - overlap)), int(latent * (1 - overlap)))
        kept = (sample - int(sample * overlap), latent - int(latent * overlap))
        lined_up = advance[0] == ratio * kept[1] and kept[0] == ratio * advance[1]
        if min(advance) >= 1 and (lined_up or self.allow_misaligned_tiles):
            return []
        return [
            f"{name} and tile_overlap_factor must make tiles that line up: {sample} and {overlap} advance by "
            f"{advance} but keep {kept} (pixels or frames, latent)"
        ]

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> HunyuanVAEConfig:
        """Read the ``ae`` section of an Open-Sora 2.0 configuration. Fields without effect on the model are dropped.

        Raises:
            ValueError: lists unknown fields, and those with a value that the model does not have.
        """
        return read(cls, "from_original", original, {"type": "hunyuan_vae", "act_fn": "silu", "channel": False})

    @classmethod
    def from_diffusers(cls, original: Mapping[str, Any]) -> HunyuanVAEConfig:
        """Read the ``config.json`` of diffusers' AutoencoderKLHunyuanVideo. Tiling is off, whatever diffusers does.

        Raises:
            ValueError: lists unknown fields, and those with a value that the model does not have.
        """
        blocks = {
            "down_block_types": ["HunyuanVideoDownBlock3D"] * len(original.get("block_out_channels", range(4))),
            "up_block_types": ["HunyuanVideoUpBlock3D"] * len(original.get("block_out_channels", range(4))),
        }
        renamed = {DIFFUSERS_NAMES.get(name, name): value for name, value in original.items() if name[:1] != "_"}
        return read(cls, "from_diffusers", renamed, {"act_fn": "silu", **blocks})


DIFFUSERS_NAMES = {"scaling_factor": "scale_factor", "temporal_compression_ratio": "time_compression_ratio"}
WITHOUT_EFFECT = {"from_pretrained", "dropout", "use_slicing"}


def read(
    cls: type[HunyuanVAEConfig], where: str, values: Mapping[str, Any], constants: Mapping[str, Any]
) -> HunyuanVAEConfig:
    """Fields with one possible value are checked and dropped, those without effect are dropped."""
    problems = [
        f"{name} must be {wanted!r}, got {values[name]!r}"
        for name, wanted in constants.items()
        if name in values and (list(values[name]) if isinstance(wanted, list) else values[name]) != wanted
    ]
    kept = {name: value for name, value in values.items() if name not in constants and name not in WITHOUT_EFFECT}
    try:
        result = loading.load(cls, kept)
    except loading.ConfigError as error:
        problems += error.problems
    if problems:
        raise ValueError(f"HunyuanVAEConfig.{where}: " + "; ".join(problems))
    return result


PRESETS = {
    # 246,478,803 parameters, tiled as the released configurations do
    "released": HunyuanVAEConfig(use_spatial_tiling=True),
    # The smallest that has every part, for tests
    "tiny": HunyuanVAEConfig(latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2),
    # Trains on two processor cores in minutes
    "small": HunyuanVAEConfig(
        latent_channels=4, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8
    ),
}


def preset(name: str, **changes: Any) -> HunyuanVAEConfig:
    """A named configuration, with fields changed: ``preset("released", use_temporal_tiling=True)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
