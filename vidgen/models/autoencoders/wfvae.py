# SPDX-License-Identifier: Apache-2.0
"""WFVAE: a causal video autoencoder whose wavelet bands bypass its backbone (WF-VAE, arXiv 2411.17459).

Follows Open-Sora Plan v1.5 (PKU-YuanGroup/Open-Sora-Plan, branch mindspeed_mmdit): 8x8x8 compression, LayerNorm.
Parameter names are the original's. Shapes: B batch, T H W frames, height and width.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import wfvae_checkpoint
from .causal import RGB, CausalAutoencoder, sample_latent, split_moments
from .layers import (
    CausalConv3d,
    Chain,
    ChannelNorm,
    Delay,
    Downsample3D,
    FrameAttention,
    FrameConv,
    ResBlock,
    Upsample3D,
    split_channels,
)
from .streaming import Stream
from .wavelets import Haar3D, InverseHaar3D
from .wfvae_config import PRESETS, WFVAEConfig, preset

__all__ = ["PRESETS", "WFVAE", "WFVAEConfig", "WFVAEOutput", "preset", "sample_latent", "split_moments"]

BANDS = 8 * RGB


class Encoder(nn.Module):
    """Every level sees the wavelet bands of its size beside what comes from the level above."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow = config.base_channels, config.encoder_energy_flow_hidden_size
        blocks = range(config.encoder_num_resblocks)
        self.wavelet_transform_in, self.wavelet_transform_l1, self.wavelet_transform_l2 = (Haar3D() for _ in range(3))
        self.connect_l1, self.connect_l2 = (FrameConv(BANDS, flow) for _ in range(2))
        self.down1 = Chain(
            FrameConv(BANDS, base), *(ResBlock(base, base, frames_apart=True) for _ in blocks), Downsample3D(base)
        )
        self.down2 = Chain(
            FrameConv(base + flow, 2 * base), *(ResBlock(2 * base, 2 * base) for _ in blocks), Downsample3D(2 * base)
        )
        attention = [FrameAttention(4 * base)] if config.use_attention else []
        self.mid = Chain(ResBlock(2 * base + flow, 4 * base), *attention, ResBlock(4 * base, 4 * base))
        self.norm_out = ChannelNorm(4 * base)
        self.conv_out = CausalConv3d(4 * base, 2 * config.latent_dim, 3, padding=1)

    def forward(self, video: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Moments, and the bands of level 1 and 2: ``(B, 24, frames, height, width)`` at 1/4 and 1/8 of the size."""
        bands0 = self.wavelet_transform_in(video, stream)
        bands1 = self.wavelet_transform_l1(bands0[:, :RGB], stream)
        bands2 = self.wavelet_transform_l2(bands1[:, :RGB], stream)
        x = self.down1(bands0, stream)
        x = self.down2(torch.cat((x, self.connect_l1(bands1, stream)), 1), stream)
        x = self.mid(torch.cat((x, self.connect_l2(bands2, stream)), 1), stream)
        return self.conv_out(self.norm_out.silu(x), stream), (bands1, bands2)


class Decoder(nn.Module):
    """Every level gives off the wavelet bands of its size; the video is their synthesis, from the smallest upwards.

    In a stream, both upsamplers hold back one frame until they see its successor, so that t frames of latent give
    t frames at level 2, then ``2t - 2``, then ``4t - 6``, and ``8t - 13`` of the video (one of each after the very
    first); the last chunk brings the rest. The bands of a level are ahead of the level above, hence the delays.
    """

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        base, flow = config.base_channels, config.decoder_energy_flow_hidden_size
        self.hidden_channels = 4 * base
        self.conv_in = CausalConv3d(config.latent_dim, 4 * base, 3, padding=1)
        attention = [FrameAttention(4 * base)] if config.use_attention else []
        self.mid = Chain(ResBlock(4 * base, 4 * base), *attention, ResBlock(4 * base, 4 * base + flow))
        self.up2 = Chain(
            *(ResBlock(4 * base, 4 * base) for _ in range(config.decoder_num_resblocks)),
            Upsample3D(4 * base),
            ResBlock(4 * base, 4 * base + flow),
        )
        self.up1 = Chain(
            ResBlock(4 * base, 2 * base),
            *(ResBlock(2 * base, 2 * base) for _ in range(config.decoder_num_resblocks - 1)),
            Upsample3D(2 * base),
            ResBlock(2 * base, 2 * base),
        )
        self.layer = Chain(ResBlock(2 * base, base), ResBlock(base, base))
        self.connect_l1, self.connect_l2 = (
            Chain(*(ResBlock(flow, flow) for _ in range(config.connect_res_layer_num)), FrameConv(flow, BANDS))
            for _ in range(2)
        )
        self.delay_l1, self.delay_l2 = Delay(), Delay()
        self.norm_out = ChannelNorm(base)
        self.conv_out = FrameConv(base, BANDS)
        self.inverse_wavelet_transform_out, self.inverse_wavelet_transform_l1, self.inverse_wavelet_transform_l2 = (
            InverseHaar3D() for _ in range(3)
        )

    def forward(self, z: Tensor, stream: Stream) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The video, and the bands of level 1 and 2 that correspond to the encoder's."""
        x, flow = split_channels(self.mid(self.conv_in(z, stream), stream), self.hidden_channels)
        bands2 = self.connect_l2(flow, stream)
        low1 = self.inverse_wavelet_transform_l2(bands2, stream)
        x, flow = split_channels(self.up2(x, stream), self.hidden_channels)
        bands1 = add_to_low_band(self.connect_l1(flow, stream), low1, self.delay_l2, stream)
        x = self.layer(self.up1(x, stream), stream)
        low0 = self.inverse_wavelet_transform_l1(bands1, stream)
        bands0 = self.conv_out(self.norm_out.silu(x), stream)
        bands0 = add_to_low_band(bands0, low0, self.delay_l1, stream)
        return self.inverse_wavelet_transform_out(bands0, stream), (bands1, bands2)


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
    """The 8x8x8 WFVAE; how it is used is described at :class:`CausalAutoencoder`.

    On processors, bfloat16 weights are used fastest after ``vae.to(memory_format=torch.channels_last_3d)``.
    """

    config_class: ClassVar[type] = WFVAEConfig
    frames_per_latent = 8
    pixels_per_latent = 8
    convert_state_dict = staticmethod(wfvae_checkpoint.convert_state_dict)

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, video: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> WFVAEOutput:
        """Encode, sample and decode ``(B, 3, 8n + 1, H, W)``, for training; noise as in :meth:`encode`."""
        moments, encoder_bands = self.encode_with_bands(video)
        mean, logvar = split_moments(moments)
        reconstruction, decoder_bands = self.decode_with_bands(sample_latent(mean, logvar, noise, generator))
        return WFVAEOutput(reconstruction, mean, logvar, encoder_bands, decoder_bands)

    def encode_with_bands(self, video: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Moments, and the wavelet bands of level 1 and 2 that the encoder saw."""
        self._check_video("encode_with_bands", video)
        return self.encoder(video, Stream())

    def decode_with_bands(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The video of an unscaled latent, and the wavelet bands of level 1 and 2 that it was made of."""
        self._check_latent("decode_with_bands", z)
        return self.decoder(z, Stream())
