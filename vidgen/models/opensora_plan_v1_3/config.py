# SPDX-License-Identifier: Apache-2.0
"""Configuration of the v1.3 transformers, in the field names of Open-Sora Plan: its ``config.json`` is ours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# Layers that are dense whatever the ratio: the original counts from the bottom, not from its number of layers.
FIRST_SPARSE_LAYER, FIRST_DENSE_TAIL_LAYER = 2, 30

# Fields that have one value in every model this code runs; they stay so that the original can read what we write.
CONSTANTS = {
    "patch_size_t": 1,  # patches lie within a frame
    "activation_fn": "gelu-approximate",
    "dropout": 0.0,
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
    "norm_elementwise_affine": False,
}


@dataclass(frozen=True)
class OpenSoraConfig:
    """Sizes and switches of ``OpenSoraT2V_v1_3``; the switches default as in the original.

    Args:
        num_attention_heads, attention_head_dim: the hidden width is their product; the latter is a multiple of 6.
        num_layers: blocks.
        caption_channels: width of the text encoder's tokens.
        in_channels, out_channels: of the latent; out defaults to in.
        cross_attention_dim: the hidden width, to which captions are projected; None means just that.
        attention_bias: biases of the query, key and value projections.
        patch_size: rows and columns in a patch.
        norm_eps: of the norms within blocks.
        interpolation_scale_t, interpolation_scale_h, interpolation_scale_w: positions are divided by these.
        sparse1d: Skiparse attention in layers 2 to 29; False makes all layers dense, with the same weights.
        sparse_n: its ratio.
        patch_size_t, activation_fn, dropout, only_cross_attention, double_self_attention, upcast_attention,
            norm_elementwise_affine: constants, see ``CONSTANTS``.
        sample_size_t, sample_size_h, sample_size_w: latent size that the model was trained at; without effect.

    Raises:
        ValueError: lists everything that is wrong with the values.
    """

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    caption_channels: int
    in_channels: int = 8
    out_channels: int | None = None
    cross_attention_dim: int | None = None
    attention_bias: bool = True
    patch_size: int = 2
    patch_size_t: int = 1
    norm_eps: float = 1e-6
    interpolation_scale_t: float = 1.0
    interpolation_scale_h: float = 1.0
    interpolation_scale_w: float = 1.0
    sparse1d: bool = False
    sparse_n: int = 2
    activation_fn: str = "gelu-approximate"
    dropout: float = 0.0
    only_cross_attention: bool = False
    double_self_attention: bool = False
    upcast_attention: bool = False
    norm_elementwise_affine: bool = False
    sample_size_t: Any = None
    sample_size_h: Any = None
    sample_size_w: Any = None

    def __post_init__(self) -> None:
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        if self.cross_attention_dim is None:
            object.__setattr__(self, "cross_attention_dim", self.hidden_size)
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def input_channels(self) -> int:
        """Channels of ``hidden_states``."""
        return self.in_channels

    @property
    def interpolation_scale(self) -> tuple[float, float, float]:
        return self.interpolation_scale_t, self.interpolation_scale_h, self.interpolation_scale_w

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """Channels of a head that rotate with the frame, the row and the column."""
        return (self.attention_head_dim // 3,) * 3

    def layer_sparsity(self, layer: int) -> tuple[int, str]:
        """Skiparse ratio and pattern of a layer; ratio 1 is dense."""
        sparse = self.sparse1d and FIRST_SPARSE_LAYER <= layer < FIRST_DENSE_TAIL_LAYER
        return (self.sparse_n if sparse else 1), ("group" if layer % 2 else "single")

    def problems(self) -> list[str]:
        """What is wrong with the values, in words; empty when all is well."""
        positive = (
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "caption_channels",
            "in_channels",
            "out_channels",
            "patch_size",
            "sparse_n",
        )
        found = [f"{name} must be at least 1, got {v}" for name in positive if (v := getattr(self, name)) < 1]
        if self.attention_head_dim % 6:
            found.append(
                "attention_head_dim must be a multiple of 6 (rotary embedding of three axes), "
                f"got {self.attention_head_dim}"
            )
        if self.cross_attention_dim != self.hidden_size:
            found.append(f"cross_attention_dim must be the hidden width, {self.hidden_size}, or absent, "
                         f"got {self.cross_attention_dim}")  # fmt: skip
        for name in ("norm_eps", "interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w"):
            if not (value := getattr(self, name)) > 0:
                found.append(f"{name} must be positive, got {value}")
        for name, wanted in CONSTANTS.items():
            if (value := getattr(self, name)) != wanted:
                found.append(f"{name} must be {wanted!r}, got {value!r}")
        return found


@dataclass(frozen=True)
class OpenSoraInpaintConfig(OpenSoraConfig):
    """As :class:`OpenSoraConfig`, for ``OpenSoraInpaint_v1_3``.

    Args:
        vae_scale_factor_t: channels of the compressed mask, one for each frame that a latent frame stands for.
    """

    vae_scale_factor_t: int = 4

    @property
    def input_channels(self) -> int:
        """Noisy latent, latent of the given frames, mask."""
        return 2 * self.in_channels + self.vae_scale_factor_t

    def problems(self) -> list[str]:
        found = super().problems()
        if self.vae_scale_factor_t < 1:
            found.append(f"vae_scale_factor_t must be at least 1, got {self.vae_scale_factor_t}")
        return found


RELEASED: dict[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "num_layers": 32,
    "caption_channels": 4096,
    "sparse1d": True,
    "sparse_n": 4,
}
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "caption_channels": 20,
    "in_channels": 4,
    "sparse1d": True,
    "sparse_n": 2,
}
SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "num_layers": 6,
    "caption_channels": 64,
    "sparse1d": True,
    "sparse_n": 2,
}

PRESETS: dict[str, OpenSoraConfig] = {
    "released": OpenSoraConfig(**RELEASED),  # 2,771,981,600 parameters
    "released_i2v": OpenSoraInpaintConfig(**RELEASED),  # 2,782,713,632 parameters
    # The smallest that have every part, for tests
    "tiny": OpenSoraConfig(**TINY),
    "tiny_i2v": OpenSoraInpaintConfig(**TINY),
    # Train on two processor cores in minutes
    "small": OpenSoraConfig(**SMALL),
    "small_i2v": OpenSoraInpaintConfig(**SMALL),
}


def preset(name: str, **changes: Any) -> OpenSoraConfig:
    """A named configuration, with fields changed: ``preset("tiny", num_layers=6)``.

    ``cross_attention_dim`` and ``out_channels`` follow the other fields unless they are given.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: no configuration {name!r}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **{"cross_attention_dim": None, "out_channels": None, **changes})
