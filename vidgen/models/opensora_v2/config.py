# SPDX-License-Identifier: Apache-2.0
"""Configuration of MMDiT, in the field names of Open-Sora 2.0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen import config as loading


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and switches of MMDiT; the defaults are those of the 11B release.

    Args:
        in_channels: of a packed token, latent channels times ``patch_size ** 2``; the output has as many.
        vec_in_dim: width of the pooled text embedding (CLIP).
        context_in_dim: width of the text tokens (T5).
        hidden_size: a multiple of ``num_heads``.
        mlp_ratio: inner width of the feed-forward networks in units of ``hidden_size``.
        num_heads: attention heads.
        depth: blocks with separate weights for text and video.
        depth_single_blocks: blocks that follow, with one set of weights for both.
        axes_dim: channels of a head that rotate with the frame, the row and the column; together a head.
        theta: base of the rotary frequencies.
        qkv_bias: biases of the query, key and value projections of the double blocks; single blocks always have them.
        guidance_embed: embed the guidance scale (guidance-distilled models).
        cond_embed: add a projection of a condition, ``in_channels + patch_size ** 2`` wide, to the video tokens.
        fused_qkv: one matrix for queries, keys and values (and the feed-forward of single blocks), as Flux has it.
        use_liger_rope: rotary pairs are the halves of a head; False: neighbouring channels, as in Flux.
        patch_size: rows and columns in a patch.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10000.0
    qkv_bias: bool = True
    guidance_embed: bool = False
    cond_embed: bool = True
    fused_qkv: bool = False
    use_liger_rope: bool = True
    patch_size: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if problems := self.problems():
            raise ValueError("MMDiTConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def latent_channels(self) -> int:
        return self.in_channels // self.patch_size**2

    @property
    def cond_channels(self) -> int:
        """Width of a condition token: the mask and the masked latent of a patch."""
        return self.in_channels + self.patch_size**2

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        positive = ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "patch_size")
        found = [f"{name} must be at least 1, got {v}" for name in positive if (v := getattr(self, name)) < 1]
        found += [
            f"{n} must not be negative, got {v}"
            for n in ("depth", "depth_single_blocks")
            if (v := getattr(self, n)) < 0
        ]
        if not self.theta > 0:
            found.append(f"theta must be positive, got {self.theta}")
        if found:
            return found
        if self.hidden_size % self.num_heads:
            found.append(f"hidden_size must be a multiple of num_heads={self.num_heads}, got {self.hidden_size}")
        if len(self.axes_dim) != 3 or any(d < 0 or d % 2 for d in self.axes_dim):
            found.append(f"axes_dim must be three even numbers, got {list(self.axes_dim)}")
        elif sum(self.axes_dim) != self.head_dim:
            found.append(
                f"axes_dim must add up to hidden_size / num_heads = {self.head_dim}, got {list(self.axes_dim)}"
            )
        if self.mlp_hidden_size < 1:
            found.append(f"mlp_ratio must give an inner width of at least 1, got {self.mlp_ratio}")
        if self.in_channels % self.patch_size**2:
            found.append(f"in_channels must be a multiple of patch_size^2={self.patch_size**2}, got {self.in_channels}")
        return found

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> MMDiTConfig:
        """Read the ``model`` section of an Open-Sora 2.0 configuration.

        Switches that are absent take the original's defaults. Fields that say how to run or load the model are
        dropped.

        Raises:
            ValueError: lists unknown and absent fields and bad values.
        """
        values = {**ORIGINAL_SWITCHES, **original}
        kept = {name: value for name, value in values.items() if name not in ORIGINAL_WITHOUT_EFFECT}
        required = [f.name for f in dataclasses.fields(cls) if f.name not in ORIGINAL_SWITCHES]
        problems = [f"{name} is missing" for name in required if name not in kept]
        if kept.get("type", "flux") != "flux":
            problems.append(f"type must be 'flux', got {kept['type']!r}")
        kept.pop("type", None)
        try:
            result = loading.load(cls, kept)
        except loading.ConfigError as error:
            problems += error.problems
        if problems:
            raise ValueError("MMDiTConfig.from_original: " + "; ".join(problems))
        return result


# The original's defaults of fields that its files need not contain.
ORIGINAL_SWITCHES = {
    "qkv_bias": True,
    "guidance_embed": False,
    "cond_embed": False,
    "fused_qkv": True,
    "use_liger_rope": False,
    "patch_size": 2,
}
ORIGINAL_WITHOUT_EFFECT = {"from_pretrained", "cache_dir", "strict_load", "grad_ckpt_settings", "grad_ckpt_setting"}

TINY = MMDiTConfig(
    in_channels=16,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
    cond_embed=False,
)

PRESETS = {
    # 11,891,390,528 parameters
    "released": MMDiTConfig(),
    # The layout of FLUX.1-dev, which makes the first image of text-to-image-to-video: 11,901,408,320 parameters
    "flux_dev": MMDiTConfig(guidance_embed=True, cond_embed=False, fused_qkv=True, use_liger_rope=False),
    # For latents of the 4x32x32 video autoencoder with 128 channels
    "high_compression": MMDiTConfig(in_channels=128, patch_size=1),
    # The smallest that have every part, for tests: text to video, and with images to start from
    "tiny": TINY,
    "tiny_i2v": dataclasses.replace(TINY, cond_embed=True),
    # Trains on two processor cores in minutes
    "small": MMDiTConfig(
        in_channels=16,
        vec_in_dim=64,
        context_in_dim=64,
        hidden_size=128,
        num_heads=4,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(8, 12, 12),
    ),
}


def preset(name: str, **changes: Any) -> MMDiTConfig:
    """A named configuration, with fields changed: ``preset("small", in_channels=64)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
