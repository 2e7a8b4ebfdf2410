# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of HunyuanVideo (arXiv 2412.03603), as Open-Sora 2.0 uses it: 4x8x8 compression, 16 channels.

Follows hpcaitech/Open-Sora, commit 7ad6a96; parameter names are the original's, which diffusers shares. Convolutions
are causal in time, but norms span all frames, so that the network as a whole is not.
Shapes: B batch, C channels, T H W frames, height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vidgen import io
from vidgen.checkpoints.hf import CONFIG, PretrainedModel, from_pretrained

from .blending import blend_frames, blend_tiles
from .causal import sample_latent, split_moments
from .coding import Coding, one_tile
from .hunyuan_vae_config import DIFFUSERS_CLASS, PRESETS, HunyuanVAEConfig, preset
from .hunyuan_vae_layers import NORM_EPS, CausalConv3d, Downsample, Level, MidBlock, Upsample
from .streaming import Stream
from .tiling import Each

__all__ = ["PRESETS", "HunyuanVAE", "HunyuanVAEConfig", "kl_divergence", "preset"]


class Encoder(nn.Module):
    """Video ``(B, 3, T, H, W)`` to moments, not yet mixed by ``quant_conv``."""

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for previous, width, stride in zip((widths[0], *widths), widths, config.strides, strict=False):
            level = Level(previous, width, config.layers_per_block, groups)
            if stride != (1, 1, 1):
                level.downsamplers.append(Downsample(width, stride))
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        stream = stream or Stream()
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return self.conv_out(stream.group_norm(self.conv_norm_out, x, silu=True), stream)


class Decoder(nn.Module):
    """Latent ``(B, C, t, h, w)``, mixed by ``post_quant_conv``, to video."""

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for previous, width, factors in zip((widths[0], *widths), widths, config.strides, strict=False):
            level = Level(previous, width, config.layers_per_block + 1, groups)
            if factors != (1, 1, 1):
                level.upsamplers.append(Upsample(width, factors))
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        stream = stream or Stream()
        x = self.mid_block(self.conv_in(z, stream), stream)
        for block in self.up_blocks:
            x = block(x, stream)
        return self.conv_out(stream.group_norm(self.conv_norm_out, x, silu=True), stream)


class HunyuanVAE(PretrainedModel):
    """Video ``(B, 3, T, H, W)`` in [-1, 1] to latent ``(B, C, (T - 1) // 4 + 1, ceil(H / 8), ceil(W / 8))`` and back.

    The inverse sizes are ``4 (t - 1) + 1``, ``8 h`` and ``8 w``. Inputs have the dtype of the weights.

    Where the configuration says so, long videos and large frames are coded in overlapping tiles that are blended
    linearly. Tiling approximates (norms and attention see one tile only) and its results carry no gradient, but it
    bounds memory: besides the input and the result, that of one tile and of the margins that its neighbours need.
    """

    config_class: ClassVar[type] = HunyuanVAEConfig
    config: HunyuanVAEConfig

    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, config: Any = None, **options: Any) -> HunyuanVAE:
        """See :func:`vidgen.checkpoints.hf.from_pretrained`; folders of diffusers are read as well."""
        file = Path(path) / CONFIG
        if config is None and file.is_file():
            values = io.read_json(file)
            if isinstance(values, dict) and values.get("_class_name") == DIFFUSERS_CLASS:
                config = HunyuanVAEConfig.from_diffusers(values)
        return from_pretrained(cls, path, config=config, **options)

    @property
    def frames_per_latent(self) -> int:
        return self.config.time_compression_ratio

    @property
    def pixels_per_latent(self) -> int:
        return self.config.spatial_compression_ratio

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of the latent of such a video."""
        time, side = self.frames_per_latent, self.pixels_per_latent
        return (frames - 1) // time + 1, (height - 1) // side + 1, (width - 1) // side + 1

    def encode_moments(self, video: Tensor) -> Tensor:
        """Mean and log-variance of the unscaled latent, ``(B, 2C, t, h, w)``, mean first, logvar not clamped.

        Raises:
            ValueError: ``video`` is not ``(B, 3, T, H, W)`` in the dtype of the weights.
        """
        config = self.config
        self._check("encode_moments: video", video, config.in_channels)
        if not (config.use_temporal_tiling and video.shape[2] > config.sample_tsize):
            return self._tiled_in_space(self._encode_whole, video, config.sample_size, config.latent_size)
        chunks = self._chunks(self._encode_whole, video, (config.sample_tsize, config.sample_size), encode=True)
        return torch.cat(list(chunks), 2)

    def encode(
        self,
        video: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        sample: bool = False,
    ) -> Tensor:
        """The scaled latent ``scale_factor * (z - shift_factor)`` with ``z = mean + exp(logvar / 2) * noise``.

        Args:
            video: ``(B, 3, T, H, W)``.
            noise: standard normal, of the latent's shape.
            generator: draws the noise instead, on its device.
            sample: draw the noise from PyTorch's global generator if neither is given, as the original does by
                default. Without all three, z = mean.

        Raises:
            ValueError: a video or noise that does not fit; noise and a generator.
        """
        mean, logvar = split_moments(self.encode_moments(video))
        if sample or noise is not None or generator is not None:
            mean = sample_latent(mean, logvar, noise, generator)
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """The video of a scaled latent ``(B, C, t, h, w)``; not clamped to [-1, 1].

        Raises:
            ValueError: a latent that does not fit.
        """
        self._check("decode: latent", latent, self.config.latent_channels)
        if not (self.config.use_temporal_tiling and latent.shape[2] > self.config.latent_tsize):
            return next(self.decode_stream(latent))
        if self.config.allow_misaligned_tiles:  # nobody knows how many frames come
            return torch.cat(list(self.decode_stream(latent)), 2)
        video: Tensor | None = None
        start = 0
        for chunk in self.decode_stream(latent):  # into its place at once: collecting the chunks would need twice this
            if video is None:
                frames = self.frames_per_latent * (latent.shape[2] - 1) + 1
                video = chunk.new_empty((*chunk.shape[:2], frames, *chunk.shape[3:]))
            video[:, :, start : start + chunk.shape[2]] = chunk
            start += chunk.shape[2]
            del chunk  # not while the next one is computed
        return cast(Tensor, video)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """The video of a scaled latent in consecutive pieces ``(B, 3, frames, H, W)``: one for each tile in time.

        Raises:
            ValueError: a latent that does not fit.
        """
        config = self.config
        self._check("decode_stream: latent", latent, config.latent_channels)
        z = latent / config.scale_factor + config.shift_factor
        if config.use_temporal_tiling and z.shape[2] > config.latent_tsize:
            yield from self._chunks(self._decode_whole, z, (config.latent_tsize, config.latent_size), encode=False)
        else:
            yield self._tiled_in_space(self._decode_whole, z, config.latent_size, config.sample_size)

    def encoding(self, video: Tensor) -> Coding:
        """What :meth:`encode_moments` does, for others to run."""
        self._check("encoding: video", video, self.config.in_channels)
        return self._coding(video, True)

    def decoding(self, latent: Tensor) -> Coding:
        """What :meth:`decode` does, for others to run."""
        config = self.config
        self._check("decoding: latent", latent, config.latent_channels)
        return self._coding(latent / config.scale_factor + config.shift_factor, False)

    def _coding(self, x: Tensor, encodes: bool) -> Coding:
        config, factor = self.config, self.frames_per_latent
        pixels, cells = (config.sample_tsize, config.sample_size), (config.latent_tsize, config.latent_size)
        size, out_size = (pixels, cells) if encodes else (cells, pixels)
        code, overlap = self._encode_whole if encodes else self._decode_whole, config.tile_overlap_factor
        tiled = config.use_spatial_tiling and max(x.shape[3:]) > size[1]
        stride = int(size[1] * (1 - overlap))

        def in_tiles(step: Callable[[int, Tensor], Tensor], x: Tensor, each: Each) -> Tensor:
            # a tile has one chunk only, and so one Stream serves all
            return blend_tiles(lambda tile: step(0, tile), x, size[1], out_size[1], overlap, each=each)

        def around(code: Callable[[Tensor], Tensor], x: Tensor, each: Each) -> Iterator[Tensor]:
            return blend_frames(code, x, size[0], out_size[0], overlap, each=each)

        return Coding(
            x,
            encodes,
            self.encoder if encodes else self.decoder,
            code,
            chunks=lambda frames: [(0, frames)],
            latents=lambda frames: (frames - 1) // factor + 1 if encodes else frames,
            first_frame=lambda latent, frames: max(0, factor * (latent - 1) + 1),
            tiles=math.prod(len(range(0, length, stride)) for length in x.shape[3:]) if tiled else 1,
            in_tiles=in_tiles if tiled else one_tile,
            around=around if config.use_temporal_tiling and x.shape[2] > size[0] else None,
        )

    def _encode_whole(self, video: Tensor, stream: Stream | None = None) -> Tensor:
        return self.quant_conv(self.encoder(video, stream))

    def _decode_whole(self, z: Tensor, stream: Stream | None = None) -> Tensor:
        return self.decoder(self.post_quant_conv(z), stream)

    def _tiled_in_space(self, code: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int) -> Tensor:
        """``code(x)``, in tiles of ``size`` (``out_size`` in the result) where a side is larger."""
        if not self.config.use_spatial_tiling or max(x.shape[3:]) <= size:
            return code(x)
        return blend_tiles(code, x, size, out_size, self.config.tile_overlap_factor)

    def _chunks(
        self, code: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, int], *, encode: bool
    ) -> Iterator[Tensor]:
        """``code(x)`` in tiles of time, each in tiles of space where it is large."""
        config = self.config
        out = (config.latent_tsize, config.latent_size) if encode else (config.sample_tsize, config.sample_size)
        step = lambda tile: self._tiled_in_space(code, tile, size[1], out[1])  # noqa: E731
        return blend_frames(step, x, size[0], out[0], config.tile_overlap_factor)

    def _check(self, name: str, x: Tensor, channels: int) -> None:
        if x.dim() != 5 or x.shape[1] != channels or 0 in x.shape:
            wanted = f"(batch, {channels}, frames, height, width)"
            raise ValueError(f"{name} must be {wanted}, got {tuple(x.shape)}")
        dtype = self.quant_conv.weight.dtype
        if x.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of the weights, {dtype}, got {x.dtype}")


def kl_divergence(moments: Tensor) -> Tensor:
    """``sum(mean^2 + var - 1 - logvar) / 2`` of each sample: moments ``(B, 2C, t, h, w)`` to ``(B)``."""
    mean, logvar = split_moments(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4))
