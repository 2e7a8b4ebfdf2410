# SPDX-License-Identifier: Apache-2.0
"""Configuration of the CogVideoX transformer, in the field names of its diffusers folders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

# Fields of the original that have one value in every release.
CONSTANTS = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
}


@dataclass(frozen=True)
class CogVideoXConfig:
    """Sizes and switches of the transformer; the defaults are those of 2B, as in diffusers.

    Args:
        num_attention_heads, attention_head_dim: the hidden width is their product.
        in_channels, out_channels: of the latent; image-to-video models see the image's latent in as many more.
        time_embed_dim: width of the conditioning vector.
        ofs_embed_dim: width of the embedding of ``ofs`` (1.5 image to video), equal to ``time_embed_dim``; None: none.
        text_embed_dim: width of the text encoder's tokens.
        num_layers: blocks.
        attention_bias: biases of the query, key and value projections.
        sample_height, sample_width: latent size that the model was trained for; the base of resized rotary positions
            and the size of the learned table.
        sample_frames: frames of the video (not of the latent) in the learned table.
        patch_size: rows and columns in a patch.
        patch_size_t: frames in a patch (1.5); None makes patches within a frame (1.0).
        temporal_compression_ratio: frames of the video in a latent frame.
        max_text_seq_length: text tokens where positions are added (2B, 5B-I2V); any number fits elsewhere.
        norm_eps: of the LayerNorms over the hidden width; that of queries and keys has 1e-6.
        spatial_interpolation_scale, temporal_interpolation_scale: divide the positions of the sine and cosine table.
        use_rotary_positional_embeddings: rotate queries and keys; False adds a table of sines and cosines instead.
        use_learned_positional_embeddings: also add a learned table (5B-I2V).
        patch_bias: bias of the patch projection of 1.0; that of 1.5 always has one.
        norm_out_eps: of the last LayerNorm alone, 1e-6 in SAT and MindSpeed-MM; None: ``norm_eps``, as in diffusers.
        rotary_grid: "linspace" stretches the trained grid over other sizes as diffusers does for 1.0, "slice" counts
            from 0 as 1.5 and SAT do; None: the former without ``patch_size_t``, the latter with it.
        learned_positions: for other numbers of frames than the learned table's, "slice" takes its first rows (SAT);
            "sincos" puts a table of sines and cosines in its place (diffusers).
        flip_sin_to_cos, freq_shift, dropout, activation_fn, timestep_activation_fn, norm_elementwise_affine: have the
            one value that every release has.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True
    norm_out_eps: float | None = None
    rotary_grid: Literal["linspace", "slice"] | None = None
    learned_positions: Literal["slice", "sincos"] = "slice"

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("CogVideoXConfig: " + "; ".join(problems))

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns in a patch."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def table_grid(self) -> tuple[int, int, int]:
        """Latent frames, and rows and columns of patches, that the learned table and the rotary base grid have."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """Channels of a head that rotate with the frame, the row and the column."""
        unit = self.attention_head_dim // 8
        return 2 * unit, 3 * unit, 3 * unit

    @property
    def last_norm_eps(self) -> float:
        return self.norm_eps if self.norm_out_eps is None else self.norm_out_eps

    @property
    def rotary_positions(self) -> str:
        return self.rotary_grid or ("linspace" if self.patch_size_t is None else "slice")

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        sizes = [
            field.name
            for field in dataclasses.fields(self)
            if field.type in ("int", "int | None") and field.name not in CONSTANTS
        ]
        given = {name: value for name in sizes if (value := getattr(self, name)) is not None}
        found = [f"{name} must be at least 1, got {value}" for name, value in given.items() if value < 1]
        found += [
            f"{name} must be {wanted!r}, got {getattr(self, name)!r}"
            for name, wanted in CONSTANTS.items()
            if getattr(self, name) != wanted
        ]
        for name in ("norm_eps", "last_norm_eps", "spatial_interpolation_scale", "temporal_interpolation_scale"):
            if not getattr(self, name) > 0:
                found.append(f"{name} must be positive, got {getattr(self, name)}")
        rotary, learned = self.use_rotary_positional_embeddings, self.use_learned_positional_embeddings
        if rotary and self.attention_head_dim % 16:
            found.append(f"attention_head_dim must be a multiple of 16 to be rotated, got {self.attention_head_dim}")
        if self.hidden_size % 16 and (learned or not rotary):
            found.append(f"the hidden width must be a multiple of 16 for sines and cosines, got {self.hidden_size}")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            found.append(f"ofs_embed_dim must be time_embed_dim={self.time_embed_dim}, got {self.ofs_embed_dim}")
        if self.ofs_embed_dim is not None and self.ofs_embed_dim % 2:
            found.append(f"ofs_embed_dim must be even, got {self.ofs_embed_dim}")
        if self.hidden_size % 2:
            found.append(f"the hidden width must be even, got {self.hidden_size}")
        if learned and not rotary:
            found.append("use_learned_positional_embeddings needs use_rotary_positional_embeddings")
        if self.patch_size_t is not None and (learned or not rotary):
            found.append("patch_size_t goes with rotary positions alone")
        if self.rotary_grid not in (None, "linspace", "slice"):
            found.append(f"rotary_grid must be 'linspace', 'slice' or None, got {self.rotary_grid!r}")
        if self.learned_positions not in ("slice", "sincos"):
            found.append(f"learned_positions must be 'slice' or 'sincos', got {self.learned_positions!r}")
        return found


B5: dict[str, Any] = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
I2V_1_0: dict[str, Any] = {"in_channels": 32, "use_learned_positional_embeddings": True}
# 300 bounds nothing here; with the 96 and 170 that also circulate, diffusers cannot make portrait videos.
V1_5: dict[str, Any] = {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 20,
    "num_layers": 2,
    "sample_height": 6,
    "sample_width": 10,
    "sample_frames": 9,
    "max_text_seq_length": 5,
}

PRESETS = {
    # 1,693,783,872 parameters
    "2b": CogVideoXConfig(),
    # 5,570,283,072 parameters
    "5b": CogVideoXConfig(**B5),
    # 5,625,087,552 parameters, of which 54,607,872 are the learned table
    "5b-i2v": CogVideoXConfig(**B5, **I2V_1_0),
    # 5,570,676,352 parameters
    "1.5-5b": CogVideoXConfig(**B5, **V1_5),
    # 5,571,594,880 parameters
    "1.5-5b-i2v": CogVideoXConfig(**B5, **V1_5, in_channels=32, ofs_embed_dim=512),
    # MindSpeed-MM's enlargement of 1.0 image to video, 14.5 billion parameters
    "15b-i2v": CogVideoXConfig(
        num_attention_heads=32,
        attention_head_dim=128,
        num_layers=64,
        in_channels=32,
        use_rotary_positional_embeddings=True,
    ),
    # The smallest that have every part, for tests
    "tiny-2b": CogVideoXConfig(**TINY),
    "tiny-5b": CogVideoXConfig(**TINY, use_rotary_positional_embeddings=True),
    "tiny-5b-i2v": CogVideoXConfig(**{**TINY, **I2V_1_0, "in_channels": 8}, use_rotary_positional_embeddings=True),
    "tiny-1.5": CogVideoXConfig(**{**V1_5, **TINY}, use_rotary_positional_embeddings=True),
    "tiny-1.5-i2v": CogVideoXConfig(
        **{**V1_5, **TINY, "in_channels": 8}, ofs_embed_dim=24, use_rotary_positional_embeddings=True
    ),
}


def preset(name: str, **changes: Any) -> CogVideoXConfig:
    """A named configuration, with fields changed: ``preset("5b", norm_out_eps=1e-6)``."""
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
