# SPDX-License-Identifier: Apache-2.0
"""WFVAE: a causal video autoencoder whose wavelet bands bypass its backbone (WF-VAE, arXiv 2411.17459).

Follows Open-Sora Plan v1.5 (PKU-YuanGroup/Open-Sora-Plan, branch mindspeed_mmdit), 8x8x8 compression, and v1.3 (branch
main), 4x8x8, whose level 1 treats every frame by itself. Parameter names are the original's. Shapes: B batch, T H W
frames, height and width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vidgen.checkpoints.hf import load_state_dict

from . import wfvae_checkpoint
from .causal import RGB, CausalAutoencoder, sample_latent, split_moments
from .coding import Coding
from .layers import (
    CausalConv3d,
    Chain,
    Delay,
    Downsample2D,
    Downsample3D,
    FrameAttention,
    FrameConv,
    ResBlock,
    Upsample2D,
    Upsample3D,
    VideoGroupNorm,
    make_norm,
    split_channels,
)
from .streaming import Stream
from .wavelets import Haar2D, Haar3D, InverseHaar2D, InverseHaar3D
from .wfvae_config import PRESETS, WFVAEConfig, preset

__all__ = ["PRESETS", "WFVAE", "WFVAEConfig", "WFVAEOutput", "preset", "sample_latent", "split_moments"]

BANDS = 8 * RGB
NO_CHUNKS = "WFVAE: norm_type 'groupnorm' normalises over all frames, so that a video cannot be chunked"


def level_1(config: WFVAEConfig) -> tuple[bool, int]:
    """Whether level 1 treats every frame by itself, and how many channels its bands have."""
    flat = config.vae_scale_factor[0] == 4
    return flat, (4 if flat else 8) * RGB


class Encoder(nn.Module):
    """Every level sees the wavelet bands of its size beside what comes from the level above."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow, norm = config.base_channels, config.encoder_energy_flow_hidden_size, config.norm_type
        blocks = range(config.encoder_num_resblocks)
        flat, bands1 = level_1(config)
        block = partial(ResBlock, norm=norm)
        self.wavelet_transform_in, self.wavelet_transform_l2 = Haar3D(), Haar3D()
        self.wavelet_transform_l1 = Haar2D() if flat else Haar3D()
        self.connect_l1, self.connect_l2 = FrameConv(bands1, flow), FrameConv(BANDS, flow)
        self.down1 = Chain(
            FrameConv(BANDS, base),
            *(block(base, base, frames_apart=True) for _ in blocks),
            Downsample2D(base) if flat else Downsample3D(base),
        )
        self.down2 = Chain(
            FrameConv(base + flow, 2 * base), *(block(2 * base, 2 * base) for _ in blocks), Downsample3D(2 * base)
        )
        attention = [FrameAttention(4 * base, norm=norm)] if config.use_attention else []
        self.mid = Chain(block(2 * base + flow, 4 * base), *attention, block(4 * base, 4 * base))
        self.norm_out = make_norm(norm, 4 * base)
        self.conv_out = CausalConv3d(4 * base, 2 * config.latent_dim, 3, padding=1)

    def forward(self, video: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Moments, and the bands of level 1 and 2: ``(B, 24 or 12, frames, height, width)`` at 1/4 and 1/8 of the
        size.
        """
        require_whole_video(self.norm_out, stream)
        bands0 = self.wavelet_transform_in(video, stream)
        bands1 = self.wavelet_transform_l1(bands0[:, :RGB], stream)
        bands2 = self.wavelet_transform_l2(bands1[:, :RGB], stream)
        x = self.down1(bands0, stream)
        x = self.down2(torch.cat((x, self.connect_l1(bands1, stream)), 1), stream)
        x = self.mid(torch.cat((x, self.connect_l2(bands2, stream)), 1), stream)
        return self.conv_out(self.norm_out.silu(x, stream), stream), (bands1, bands2)


class Decoder(nn.Module):
    """Every level gives off the wavelet bands of its size; the video is their synthesis, from the smallest upwards.

    In a stream, upsamplers of time hold back one frame until they see its successor, so that t frames of latent give
    t frames at level 2, then ``2t - 2``, then ``4t - 6``, and ``8t - 13`` of the video (one of each after the very
    first); the last chunk brings the rest. The bands of a level are ahead of the level above, hence the delays. At
    4x8x8 there is one such upsampler, and ``2t - 2`` frames give ``4t - 5`` of the video.
    """

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow, norm = config.base_channels, config.decoder_energy_flow_hidden_size, config.norm_type
        flat, bands1 = level_1(config)
        block, enlarge = partial(ResBlock, norm=norm), partial(Upsample3D, t_interpolation=config.t_interpolation)
        self.hidden_channels = 4 * base
        self.conv_in = CausalConv3d(config.latent_dim, 4 * base, 3, padding=1)
        attention = [FrameAttention(4 * base, norm=norm)] if config.use_attention else []
        self.mid = Chain(block(4 * base, 4 * base), *attention, block(4 * base, 4 * base + flow))
        self.up2 = Chain(
            *(block(4 * base, 4 * base) for _ in range(config.decoder_num_resblocks)),
            enlarge(4 * base),
            block(4 * base, 4 * base + flow),
        )
        self.up1 = Chain(
            block(4 * base, 2 * base),
            *(block(2 * base, 2 * base) for _ in range(config.decoder_num_resblocks - 1)),
            Upsample2D(2 * base) if flat else enlarge(2 * base),
            block(2 * base, 2 * base),
        )
        self.layer = Chain(block(2 * base, base), block(base, base))
        self.connect_l1, self.connect_l2 = (
            Chain(*(block(flow, flow) for _ in range(config.connect_res_layer_num)), FrameConv(flow, bands))
            for bands in (bands1, BANDS)
        )
        self.delay_l1, self.delay_l2 = Delay(), Delay()
        self.norm_out = make_norm(norm, base)
        self.conv_out = FrameConv(base, BANDS)
        self.inverse_wavelet_transform_out, self.inverse_wavelet_transform_l2 = InverseHaar3D(), InverseHaar3D()
        self.inverse_wavelet_transform_l1 = InverseHaar2D() if flat else InverseHaar3D()

    def forward(self, z: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The video, and the bands of level 1 and 2 that correspond to the encoder's."""
        require_whole_video(self.norm_out, stream)
        x, flow = split_channels(self.mid(self.conv_in(z, stream), stream), self.hidden_channels)
        bands2 = self.connect_l2(flow, stream)
        low1 = self.inverse_wavelet_transform_l2(bands2, stream)
        x, flow = split_channels(self.up2(x, stream), self.hidden_channels)
        bands1 = add_to_low_band(self.connect_l1(flow, stream), low1, self.delay_l2, stream)
        x = self.layer(self.up1(x, stream), stream)
        low0 = self.inverse_wavelet_transform_l1(bands1, stream)
        bands0 = self.conv_out(self.norm_out.silu(x, stream), stream)
        bands0 = add_to_low_band(bands0, low0, self.delay_l1, stream)
        return self.inverse_wavelet_transform_out(bands0, stream), (bands1, bands2)


def require_whole_video(norm: nn.Module, stream: Stream) -> None:
    """Raise ValueError for a second chunk, which norms over whole videos do not allow."""
    if isinstance(norm, VideoGroupNorm) and stream.chunked:
        raise ValueError(NO_CHUNKS)


def add_to_low_band(bands: Tensor, low: Tensor, delay: Delay, stream: Stream) -> Tensor:
    """``bands`` with ``low`` added to its first three channels; ``low`` may have more frames, which wait."""
    low = delay(low, bands.shape[2], stream)
    return torch.cat((bands[:, :RGB] + low, bands[:, RGB:]), 1)


class WFVAEOutput(NamedTuple):
    """What training needs of one pass; the bands are those of level 1 and level 2."""

    reconstruction: Tensor
    mean: Tensor
    logvar: Tensor
    encoder_bands: tuple[Tensor, Tensor]
    decoder_bands: tuple[Tensor, Tensor]


class WFVAE(CausalAutoencoder):
    """A WFVAE of 8x8x8 or 4x8x8; how it is used is described at :class:`CausalAutoencoder`.

    On processors, bfloat16 weights are used fastest after ``vae.to(memory_format=torch.channels_last_3d)``.
    """

    config_class: ClassVar[type] = WFVAEConfig
    frames_per_latent = 8  # of the class's default configuration; an instance has its own
    pixels_per_latent = 8
    convert_state_dict = staticmethod(wfvae_checkpoint.convert_state_dict)

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.frames_per_latent, self.pixels_per_latent = config.vae_scale_factor[:2]
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **stated: Any,
    ) -> WFVAE:
        """Load a file of weights without a configuration, which is read off the weights.

        Args:
            path: as for :meth:`from_pretrained`, most often a ``.ckpt``.
            dtype, device: as for :meth:`from_pretrained`.
            stated: configuration fields that weights do not tell, see ``wfvae_checkpoint.infer_config``.

        Raises:
            ValueError: a damaged file, or one without the weights of a WFVAE.
        """
        state = wfvae_checkpoint.convert_state_dict(load_state_dict(path))
        config = wfvae_checkpoint.infer_config(state, **stated)
        return cls.from_pretrained(path, config=config, dtype=dtype, device=device)

    def forward(
        self, video: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> WFVAEOutput:
        """Encode, sample and decode ``(B, 3, frames, H, W)``, for training; noise as in :meth:`encode`."""
        moments, encoder_bands = self.encode_with_bands(video)
        mean, logvar = split_moments(moments)
        reconstruction, decoder_bands = self.decode_with_bands(sample_latent(mean, logvar, noise, generator))
        return WFVAEOutput(reconstruction, mean, logvar, encoder_bands, decoder_bands)

    def _coding(self, x: Tensor, *arguments: Any) -> Coding:
        coding = super()._coding(x, *arguments)
        if self.config.norm_type == "groupnorm" and len(coding.chunks(x.shape[2])) > 1:
            raise ValueError(NO_CHUNKS)
        return coding

    def encode_with_bands(self, video: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Moments, and the wavelet bands of level 1 and 2 that the encoder saw."""
        self._check_video("encode_with_bands", video)
        return self.encoder(video, Stream())

    def decode_with_bands(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The video of an unscaled latent, and the wavelet bands of level 1 and 2 that it was made of."""
        self._check_latent("decode_with_bands", z)
        return self.decoder(z, Stream())
