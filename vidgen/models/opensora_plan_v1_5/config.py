# SPDX-License-Identifier: Apache-2.0
"""Configuration of SparseUMMDiT, in the field names of Open-Sora Plan v1.5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vidgen import config as loading


@dataclass(frozen=True)
class SparseUMMDiTConfig:
    """Sizes and switches of SparseUMMDiT; the defaults are the release's.

    Args:
        num_layers: blocks in each stage; an odd number of stages, each of an even number of blocks. Stages before the
            middle one feed those after it through skip connections.
        sparse_n: Skiparse ratio of each stage; 1 is dense attention.
        num_heads, head_dim: attention heads; head_dim is a multiple of 16. The hidden width is their product.
        in_channels, out_channels: of the latent.
        timestep_embed_dim: width of the conditioning vector, even.
        caption_channels: width of the text encoder's tokens.
        pooled_projection_dim: width of the pooled text embedding.
        patch_size: rows and columns in a patch.
        patch_size_t: frames in a patch; only 1 works, since the patch embedding sees one frame at a time.
        double_ff: text has a feed-forward network of its own. Where it shares the visual one, text enters it without
            norm and modulation, as in the original.
        sparse1d: use ``sparse_n``; False makes every stage dense, with the same weights.
        skip_connection: join the streams of mirrored stages.
        skip_connection_zero_init: start the skip linears as if there were no skip; False puts a norm before them.
        attention_bias: biases of the query, key and value projections.
        norm_cls: kind of every norm but those of queries and keys, which are always RMSNorm.
        norm_eps: of every norm.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    num_layers: tuple[int, ...]
    sparse_n: tuple[int, ...]
    num_heads: int
    head_dim: int
    in_channels: int = 32
    out_channels: int = 32
    timestep_embed_dim: int = 1024
    caption_channels: int = 2048
    pooled_projection_dim: int = 1280
    patch_size: int = 2
    patch_size_t: int = 1
    double_ff: bool = True
    sparse1d: bool = True
    skip_connection: bool = True
    skip_connection_zero_init: bool = True
    attention_bias: bool = True
    norm_cls: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_layers", tuple(self.num_layers))
        object.__setattr__(self, "sparse_n", tuple(self.sparse_n))
        if problems := self.problems():
            raise ValueError("SparseUMMDiTConfig: " + "; ".join(problems))

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def stage_ratios(self) -> tuple[int, ...]:
        """The Skiparse ratio that each stage works with."""
        return self.sparse_n if self.sparse1d else (1,) * len(self.num_layers)

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """Channels of a head that rotate with the frame, the row and the column."""
        unit = self.head_dim // 16
        return 4 * unit, 6 * unit, 6 * unit

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        positive = (
            "num_heads",
            "head_dim",
            "in_channels",
            "out_channels",
            "timestep_embed_dim",
            "caption_channels",
            "pooled_projection_dim",
            "patch_size",
        )
        found = [f"{name} must be at least 1, got {v}" for name in positive if (v := getattr(self, name)) < 1]
        if len(self.num_layers) % 2 == 0:
            found.append(f"num_layers must have an odd number of stages, got {len(self.num_layers)}")
        if any(n < 2 or n % 2 for n in self.num_layers):
            found.append(f"num_layers must be even numbers from 2 on, got {list(self.num_layers)}")
        if len(self.num_layers) != len(self.sparse_n):
            lengths = f"{len(self.num_layers)} and {len(self.sparse_n)}"
            found.append(f"num_layers and sparse_n must have the same length, got {lengths}")
        if any(n < 1 for n in self.sparse_n):
            found.append(f"sparse_n must be at least 1 in every stage, got {list(self.sparse_n)}")
        if self.head_dim % 16:
            found.append(f"head_dim must be a multiple of 16 (rotary embedding of three axes), got {self.head_dim}")
        if self.timestep_embed_dim % 2:
            found.append(f"timestep_embed_dim must be even, got {self.timestep_embed_dim}")
        if self.patch_size_t != 1:
            found.append(f"patch_size_t must be 1 (patches lie within a frame), got {self.patch_size_t}")
        if self.norm_cls not in ("layer_norm", "rms_norm"):
            found.append(f"norm_cls must be 'layer_norm' or 'rms_norm', got {self.norm_cls!r}")
        if not self.norm_eps > 0:
            found.append(f"norm_eps must be positive, got {self.norm_eps}")
        return found

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> SparseUMMDiTConfig:
        """Read the ``predictor`` section of an Open-Sora Plan v1.5 model JSON.

        Switches that are absent take the original's defaults. Fields without effect on the model are dropped.

        Raises:
            ValueError: lists unknown fields, and known ones with a value that the model does not have.
        """
        values = {**ORIGINAL_SWITCHES, **original}
        problems = [
            f"{name} must be {wanted!r}, got {values[name]!r}"
            for name, wanted in ORIGINAL_CONSTANTS.items()
            if name in values and values[name] != wanted
        ]
        if values.get("out_channels") is None and "in_channels" in values:
            values["out_channels"] = values["in_channels"]
        kept = {k: v for k, v in values.items() if k not in ORIGINAL_CONSTANTS and k not in ORIGINAL_WITHOUT_EFFECT}
        try:
            result = loading.load(cls, kept)
        except loading.ConfigError as error:
            problems += error.problems
        if problems:
            raise ValueError("SparseUMMDiTConfig.from_original: " + "; ".join(problems))
        return result


# The original's defaults where they differ from the release, and fields that its files need not contain.
ORIGINAL_SWITCHES = {"double_ff": False, "sparse1d": False, "skip_connection": False}

# Fields of the original that have one value in every model this code runs.
ORIGINAL_CONSTANTS = {
    "model_id": "SparseUMMDiT",
    "activation_fn": "gelu-approximate",
    "dropout": 0.0,
    "explicit_uniform_rope": False,
    "interpolation_scale_t": 1.0,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_w": 1.0,
}

# Norms are always affine; the sample sizes only bound the random offsets of explicit_uniform_rope.
ORIGINAL_WITHOUT_EFFECT = {
    "norm_elementwise_affine",
    "sample_size_t",
    "sample_size_h",
    "sample_size_w",
    "from_pretrained",
    "dtype",
}

PRESETS = {
    # 8,504,661,120 parameters
    "released": SparseUMMDiTConfig((2, 4, 6, 8, 6, 4, 2), (1, 2, 4, 8, 4, 2, 1), num_heads=24, head_dim=128),
    # The smallest that has every part, for tests
    "tiny": SparseUMMDiTConfig(
        (2, 2, 2),
        (1, 2, 1),
        num_heads=2,
        head_dim=16,
        in_channels=4,
        out_channels=4,
        timestep_embed_dim=32,
        caption_channels=20,
        pooled_projection_dim=12,
    ),
    # Trains on two processor cores in minutes
    "small": SparseUMMDiTConfig(
        (2, 2, 2),
        (1, 2, 1),
        num_heads=4,
        head_dim=32,
        in_channels=8,
        out_channels=8,
        timestep_embed_dim=128,
        caption_channels=64,
        pooled_projection_dim=64,
    ),
}


def preset(name: str, **changes: Any) -> SparseUMMDiTConfig:
    """A named configuration, with fields changed: ``preset("small", in_channels=16)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
