# SPDX-License-Identifier: Apache-2.0
"""The VAE of CogVideoX 1.0 and 1.5 (arXiv 2408.06072): 4x8x8 compression, GroupNorm, causal in time.

Follows diffusers' ``AutoencoderKLCogVideoX`` and THUDM/CogVideo ``sat/vae_modules/cp_enc_dec.py``; parameter names are
diffusers'. Shapes: B batch, D latent channels, T H W of the video, t h w of the latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vidgen.checkpoints.hf import PretrainedModel

from . import cogvideox_vae_checkpoint as keys
from .causal import sample_latent, split_moments, step_of
from .coding import Coding
from .cogvideox_vae_batches import first_frame, frame_batches, halved, join
from .cogvideox_vae_config import CogVideoXVAEConfig
from .cogvideox_vae_layers import FIXED_EPS, Downsample, GroupNorm, Level, ResnetBlock, SpatialNorm, Upsample
from .cogvideox_vae_tiling import DiffusersTiling, run_diffusers_tiles
from .layers import CausalConv3d
from .streaming import Stream
from .tiling import place_tiles, run_tiled

ENCODED_FRAMES = 8
DECODED_LATENTS = 2


class Encoder(nn.Module):
    def __init__(self, config: CogVideoXVAEConfig) -> None:
        super().__init__()
        widths, groups, eps = config.block_out_channels, config.norm_num_groups, config.norm_eps
        self.conv_in = CausalConv3d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            resnets = [ResnetBlock(width if j else before, width, groups, eps) for j in range(config.layers_per_block)]
            resampler = Downsample(width, i < config.time_levels) if i < len(widths) - 1 else None
            self.down_blocks.append(Level(resnets, resampler))
            before = width
        self.mid_block = Level([ResnetBlock(before, before, groups, eps) for _ in range(2)], None)
        self.norm_out = GroupNorm(groups, before, eps=FIXED_EPS)
        self.conv_out = CausalConv3d(before, 2 * config.latent_channels, 3, padding=1)

    def forward(self, video: Tensor, stream: Stream) -> tuple[Tensor]:
        x = self.conv_in(video, stream)
        for level in self.down_blocks:
            x = level(x, stream)
        x = self.mid_block(x, stream)
        return (self.conv_out(self.norm_out.silu(x, None, stream), stream),)


class Decoder(nn.Module):
    def __init__(self, config: CogVideoXVAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        kind = (config.norm_num_groups, config.norm_eps, config.latent_channels)
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level([ResnetBlock(widths[0], widths[0], *kind) for _ in range(2)], None)
        self.up_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            resnets = [ResnetBlock(width if j else before, width, *kind) for j in range(config.layers_per_block + 1)]
            resampler = Upsample(width, i < config.time_levels) if i < len(widths) - 1 else None
            self.up_blocks.append(Level(resnets, resampler))
            before = width
        self.norm_out = SpatialNorm(before, config.latent_channels, config.norm_num_groups)
        self.conv_out = CausalConv3d(before, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, stream: Stream) -> tuple[Tensor]:
        x = self.mid_block(self.conv_in(z, stream), stream, z)
        for level in self.up_blocks:
            x = level(x, stream, z)
        return (self.conv_out(self.norm_out.silu(x, z, stream), stream),)


class AutoencoderKLCogVideoX(PretrainedModel):
    """Video ``(B, 3, T, H, W)`` in [-1, 1] to latent ``(B, D, t, h, w)`` and back; inputs have the weights' dtype.

    Time passes in batches of frames: GroupNorm sees one batch, and the memory is that of one batch. Of n frames and
    batches of b, the first batch has ``b + n % b`` and the others b. A batch of an odd number of frames begins with a
    still: T = 4n + 1 becomes t = n + 1 and back, where all batches but the first are even. An even first batch has no
    still: 4 latent frames decode to 16 frames, 3 to 9.

    Tiles in space (``tile_size``, ``tile_overlap``, in pixels, the overlap a quarter of the tile unless stated) are
    blended linearly and approximate. ``diffusers_tiling`` cuts and blends them as diffusers does instead.
    """

    config_class: ClassVar[type] = CogVideoXVAEConfig
    config: CogVideoXVAEConfig
    convert_state_dict = staticmethod(keys.convert_state_dict)

    def __init__(self, config: CogVideoXVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def frames_per_latent(self) -> int:
        return self.config.temporal_compression_ratio

    @property
    def pixels_per_latent(self) -> int:
        return self.config.pixels_per_latent

    def encode_moments(
        self,
        video: Tensor,
        *,
        chunk_frames: int | None = ENCODED_FRAMES,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        diffusers_tiling: DiffusersTiling | None = None,
    ) -> Tensor:
        """Mean and log-variance of the unscaled latent, ``(B, 2D, t, h, w)``, mean first, logvar not clamped.

        Args:
            video: ``(B, 3, T, H, W)``, H and W multiples of 8.
            chunk_frames: frames of a batch, a multiple of 4 (diffusers: 8); None encodes the clip as one batch, as SAT
                and MindSpeed-MM do. The two agree for clips that are one batch anyhow, of up to 15 frames.
            tile_size, tile_overlap, diffusers_tiling: see the class.

        Raises:
            ValueError: a video, batch or tile of a size that does not fit, or two kinds of tiles.
        """
        self.check("encode_moments", "video", video, self.config.in_channels, self.pixels_per_latent)
        frames, factor = video.shape[2], self.frames_per_latent
        check_chunk_frames("encode_moments", chunk_frames, factor)
        spans = frame_batches(frames, frames if chunk_frames is None else chunk_frames)
        if diffusers_tiling is not None:
            refuse_both("encode_moments", tile_size, tile_overlap)
            return run_diffusers_tiles(
                video, lambda x: join(self.run(self.encoder, x, spans)), diffusers_tiling.for_encoding(self.config)
            )
        return join(self.run(self.encoder, video, spans, tile_size, tile_overlap, in_unit=self.pixels_per_latent))

    def encode(
        self,
        video: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        sample: bool = False,
        chunk_frames: int | None = ENCODED_FRAMES,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        diffusers_tiling: DiffusersTiling | None = None,
    ) -> Tensor:
        """The scaled latent ``z * scaling_factor``, ``(B, D, t, h, w)``, with ``z = mean + exp(logvar / 2) * noise``.

        Args:
            video, chunk_frames, tile_size, tile_overlap, diffusers_tiling: as in :meth:`encode_moments`.
            noise: standard normal, ``(B, D, t, h, w)``.
            generator: draws the noise instead, on its device.
            sample: draw the noise from PyTorch's global generator if neither is given. Without all three, z = mean.

        Raises:
            ValueError: sizes that do not fit; noise and a generator.
        """
        moments = self.encode_moments(
            video,
            chunk_frames=chunk_frames,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            diffusers_tiling=diffusers_tiling,
        )
        mean, logvar = split_moments(moments)
        if sample or noise is not None or generator is not None:
            mean = sample_latent(mean, logvar, noise, generator)
        return self.normalize(mean)

    def decode(
        self,
        latent: Tensor,
        *,
        chunk_latents: int | Sequence[int] = DECODED_LATENTS,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        diffusers_tiling: DiffusersTiling | None = None,
    ) -> Tensor:
        """The video ``(B, 3, T, H, W)`` of a scaled latent ``(B, D, t, h, w)``; not clamped to [-1, 1].

        Args:
            latent: as from :meth:`encode`.
            chunk_latents: latent frames of a batch, or of each one (:func:`sat_decode_batches`).
            tile_size, tile_overlap, diffusers_tiling: see the class.

        Raises:
            ValueError: a latent, batch or tile of a size that does not fit, or two kinds of tiles.
        """
        self.check("decode", "latent", latent, self.config.latent_channels, 1)
        return self.decode_unscaled(
            self.unnormalize(latent),
            chunk_latents=chunk_latents,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            diffusers_tiling=diffusers_tiling,
        )

    def decode_unscaled(
        self,
        z: Tensor,
        *,
        chunk_latents: int | Sequence[int] = DECODED_LATENTS,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        diffusers_tiling: DiffusersTiling | None = None,
    ) -> Tensor:
        """The video of an unscaled latent; otherwise as :meth:`decode`."""
        self.check("decode_unscaled", "z", z, self.config.latent_channels, 1)
        spans = frame_batches(z.shape[2], chunk_latents)
        frames = sum(self.frames_decoded(stop - start) for start, stop in spans)
        if diffusers_tiling is not None:
            refuse_both("decode", tile_size, tile_overlap)
            return run_diffusers_tiles(
                z, lambda x: join(self.run(self.decoder, x, spans), frames), diffusers_tiling.for_decoding(self.config)
            )
        return join(self.run(self.decoder, z, spans, tile_size, tile_overlap, out_unit=self.pixels_per_latent), frames)

    @torch.no_grad()
    def decode_stream(
        self,
        latent: Tensor,
        *,
        chunk_latents: int | Sequence[int] = DECODED_LATENTS,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Iterator[Tensor]:
        """What :meth:`decode` returns, batch by batch, in the memory of one batch; without gradient."""
        self.check("decode_stream", "latent", latent, self.config.latent_channels, 1)
        spans = frame_batches(latent.shape[2], chunk_latents)
        z = self.unnormalize(latent)
        yield from self.run(self.decoder, z, spans, tile_size, tile_overlap, out_unit=self.pixels_per_latent)

    def encoding(
        self,
        video: Tensor,
        *,
        chunk_frames: int | None = ENCODED_FRAMES,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        diffusers_tiling: DiffusersTiling | None = None,
    ) -> Coding:
        """What :meth:`encode_moments` does with the same arguments, for others to run."""
        self.check("encoding", "video", video, self.config.in_channels, self.pixels_per_latent)
        check_chunk_frames("encoding", chunk_frames, self.frames_per_latent)
        size = video.shape[2] if chunk_frames is None else chunk_frames
        return self.coding(video, True, size, tile_size, tile_overlap, diffusers_tiling)

    def decoding(
        self,
        latent: Tensor,
        *,
        chunk_latents: int | Sequence[int] = DECODED_LATENTS,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        diffusers_tiling: DiffusersTiling | None = None,
    ) -> Coding:
        """What :meth:`decode` does with the same arguments, for others to run."""
        self.check("decoding", "latent", latent, self.config.latent_channels, 1)
        return self.coding(self.unnormalize(latent), False, chunk_latents, tile_size, tile_overlap, diffusers_tiling)

    def coding(
        self,
        x: Tensor,
        encodes: bool,
        batches: int | Sequence[int],
        tile_size: int | None,
        tile_overlap: int | None,
        diffusers_tiling: DiffusersTiling | None,
    ) -> Coding:
        network, side, levels = (
            self.encoder if encodes else self.decoder,
            self.pixels_per_latent,
            self.config.time_levels,
        )
        units = (side, 1) if encodes else (1, side)
        cells = x.shape[3] // units[0], x.shape[4] // units[0]
        tiles = place_tiles(*cells, tile_size=tile_size, tile_overlap=tile_overlap, pixels_per_cell=side)
        around = None
        if diffusers_tiling is not None:
            refuse_both("encoding" if encodes else "decoding", tile_size, tile_overlap)
            cuts = diffusers_tiling.cuts(self.config, encodes)
            around = lambda code, x, each: iter((run_diffusers_tiles(x, code, cuts, each=each),))  # noqa: E731
        frame_batches(x.shape[2], batches)  # raises now
        return Coding(
            x,
            encodes,
            network,
            lambda x, stream: network(x, stream)[0],
            lambda frames: frame_batches(frames, batches),
            latents=lambda frames: halved(frames, levels)[-1] if encodes else frames,
            first_frame=lambda i, frames: first_frame(i, halved(frames, levels)[:-1] if encodes else [frames] * levels),
            independent=True,
            tiles=len(tiles),
            in_tiles=lambda step, x, each: run_tiled(x, tiles, step, in_unit=units[0], out_unit=units[1], each=each),
            around=around,
        )

    def run(
        self,
        network: nn.Module,
        x: Tensor,
        spans: Sequence[tuple[int, int]],
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        *,
        in_unit: int = 1,
        out_unit: int = 1,
    ) -> Iterator[Tensor]:
        """One half of the VAE, batch by batch, with a Stream for every tile. Nothing is stored in the modules."""
        cells = x.shape[3] // in_unit, x.shape[4] // in_unit
        side = self.pixels_per_latent
        tiles = place_tiles(*cells, tile_size=tile_size, tile_overlap=tile_overlap, pixels_per_cell=side)
        streams = [Stream() for _ in range(len(tiles))]
        for start, stop in spans:
            step = step_of(network, streams, first=start == 0, last=stop == x.shape[2])
            yield run_tiled(x[:, :, start:stop], tiles, step, in_unit=in_unit, out_unit=out_unit)

    def frames_decoded(self, latents: int) -> int:
        """Frames that a batch of latent frames becomes."""
        return (latents - latents % 2) * self.frames_per_latent + latents % 2

    def normalize(self, z: Tensor) -> Tensor:
        """``z * scaling_factor``: what the transformer sees."""
        return z * self.config.scaling_factor

    def unnormalize(self, latent: Tensor) -> Tensor:
        """``latent / scaling_factor``: what the decoder sees."""
        return latent / self.config.scaling_factor

    def normalize_image(self, z: Tensor) -> Tensor:
        """The unscaled latent of a first frame as image-to-video models see it while sampling with diffusers.

        ``z * scaling_factor``, or with ``invert_scale_latents`` (1.5) ``z / scaling_factor``. SAT samples 1.5 with z
        itself; all were trained with ``z * scaling_factor``.
        """
        return self.unnormalize(z) if self.config.invert_scale_latents else self.normalize(z)

    def check(self, where: str, name: str, x: Tensor, channels: int, side: int) -> None:
        if x.dim() != 5 or x.shape[1] != channels or 0 in x.shape or x.shape[3] % side or x.shape[4] % side:
            multiples = "" if side == 1 else f" with height and width multiples of {side}"
            wanted = f"(batch, {channels}, frames, height, width){multiples}"
            raise ValueError(f"{where}: {name} must be {wanted}, got {tuple(x.shape)}")
        dtype = self.encoder.conv_in.conv.weight.dtype
        if x.dtype != dtype:
            raise ValueError(f"{where}: {name} must have the dtype of the weights, {dtype}, got {x.dtype}")


def check_chunk_frames(where: str, chunk_frames: int | None, factor: int) -> None:
    if chunk_frames is not None and (chunk_frames < factor or chunk_frames % factor):
        raise ValueError(f"{where}: chunk_frames must be a positive multiple of {factor} or None, got {chunk_frames}")


def refuse_both(where: str, tile_size: int | None, tile_overlap: int | None) -> None:
    if tile_size is not None or tile_overlap is not None:
        raise ValueError(f"{where}: tile_size and tile_overlap, or diffusers_tiling: got both")
