# SPDX-License-Identifier: Apache-2.0
"""How Open-Sora Plan v1.3 decodes in chunks, with its error; for comparison only.

The original decodes latent frame 0 and then two at a time, looking one frame ahead at each chunk's end. Every
convolution keeps the frames before that look-ahead for the next chunk. With an even number of latent frames the last
chunk but one has no look-ahead, and the convolutions keep frames from too early: the last four frames of the video come
out wrong, and the two before them are of a video that ends there.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .layers import CausalConv3d, Upsample3D
from .streaming import Stream, last_frames
from .wfvae import WFVAE, Decoder


class MisplacedStream(Stream):
    """Keeps what the original keeps of a chunk that it takes to end with a look-ahead of one latent frame."""

    def __init__(self, frames_ahead: dict[nn.Module, int]) -> None:
        super().__init__()
        self.frames_ahead = frames_ahead
        self.given_of_previous = 2

    def keep_end(self, layer: nn.Module, x: Tensor, count: int, before: Tensor | None) -> None:
        ahead = self.frames_ahead[layer]
        self._kept[layer] = last_frames(x, count + ahead, before)[:, :, :count].clone()

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Upsamplers keep the last frame but one, by a hook of :func:`decode_with_original_chunks`."""


@torch.no_grad()
def decode_with_original_chunks(vae: WFVAE, latent: Tensor) -> Tensor:
    """As ``vae.decode(latent)``, with the original's error for even numbers of latent frames.

    Args:
        vae: of 4x8x8.
        latent: scaled, ``(B, D, t, h, w)``.

    Raises:
        ValueError: another VAE, a latent that does not fit, or two latent frames, with which the original fails.
    """
    if vae.frames_per_latent != 4:
        raise ValueError(f"decode_with_original_chunks: vae must be of 4x8x8, got {vae.config.vae_scale_factor}")
    frames = latent.shape[2]
    if frames % 2:
        return vae.decode(latent)
    if frames == 2:
        raise ValueError("decode_with_original_chunks: latent must not have 2 frames, which the original cannot chunk")
    z, decoder = vae.unnormalize(latent), cast(Decoder, vae.decoder)
    stream = MisplacedStream(convolutions_ahead(decoder))
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output: stream._kept.__setitem__(module, inputs[0][:, :, -2:-1].clone())
        )
        for module in decoder.modules()
        if isinstance(module, Upsample3D)
    ]
    before = decoder(z[:, :, :-1], stream)[0]
    for hook in hooks:
        hook.remove()
    stream.first = False
    return torch.cat((before, decoder(z[:, :, -1:], stream)[0]), 2)


def convolutions_ahead(decoder: Decoder) -> dict[nn.Module, int]:
    """How many frames of each convolution's input the original takes for the look-ahead: 1 below the upsampler of time,
    2 above it.
    """
    frames: dict[nn.Module, int] = {}
    above = False
    for part in (decoder.conv_in, decoder.mid, decoder.connect_l2, *decoder.up2, decoder.up1, decoder.connect_l1):
        above = above or isinstance(part, Upsample3D)
        frames |= {module: 2 if above else 1 for module in part.modules() if isinstance(module, CausalConv3d)}
    return frames | {module: 2 for module in decoder.layer.modules() if isinstance(module, CausalConv3d)}
