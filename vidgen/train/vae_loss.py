# SPDX-License-Identifier: Apache-2.0
"""Loss of a WFVAE: reconstruction, prior and agreement of the wavelet bands (WF-VAE, arXiv 2411.17459, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.models.autoencoders.wfvae import WFVAEOutput


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the terms of :func:`vae_loss`; the defaults are those of Open-Sora Plan.

    Raises:
        ValueError: a negative weight.
    """

    reconstruction_weight: float = 1.0
    kl_weight: float = 1e-6
    wavelet_weight: float = 0.1

    def __post_init__(self) -> None:
        negative = [f"{name}={value}" for name, value in vars(self).items() if not value >= 0]
        if negative:
            raise ValueError(f"VAELossConfig: weights must not be negative, got {', '.join(negative)}")


def vae_loss(
    output: WFVAEOutput, video: Tensor, config: VAELossConfig | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """``reconstruction_weight * reconstruction + kl_weight * kl + wavelet_weight * wavelet``.

    With a batch of B videos of T frames, and sums over everything (Open-Sora Plan v1.3, LPIPSWithDiscriminator3D)::

        reconstruction = sum |video - output.reconstruction| / (B T)
        kl             = sum (mean^2 + exp(logvar) - 1 - logvar) / 2 / B
        wavelet        = sum over levels 1 and 2 of sum |encoder's bands - decoder's bands| / B

    Args:
        output: what ``WFVAE.forward`` returned for ``video``.
        video: ``(batch, 3, frames, height, width)`` in [-1, 1].
        config: the weights.

    Returns:
        The scalar loss and its unweighted terms, detached, by name; all float32 (float64 stays float64).

    Raises:
        ValueError: the reconstruction has another shape than the video.
    """
    config = config or VAELossConfig()
    if output.reconstruction.shape != video.shape:
        wanted = tuple(output.reconstruction.shape)
        raise ValueError(f"vae_loss: video must be {wanted} like the reconstruction, got {tuple(video.shape)}")
    batch, frames = video.shape[0], video.shape[2]
    terms = {
        "reconstruction": absolute_difference(video, output.reconstruction) / (batch * frames),
        "kl": kl_divergence(output.mean, output.logvar),
        "wavelet": band_difference(output.encoder_bands, output.decoder_bands),
    }
    loss = (
        config.reconstruction_weight * terms["reconstruction"]
        + config.kl_weight * terms["kl"]
        + config.wavelet_weight * terms["wavelet"]
    )
    return loss, {name: term.detach() for name, term in terms.items()}


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """From ``N(mean, exp(logvar))`` to the standard normal, summed over a latent and averaged over the batch."""
    mean, logvar = _wide(mean), _wide(logvar)
    return (mean.square() + logvar.exp() - 1 - logvar).sum() / (2 * mean.shape[0])


def band_difference(encoder_bands: Sequence[Tensor], decoder_bands: Sequence[Tensor]) -> Tensor:
    """Absolute difference of wavelet bands, summed over levels and bands and averaged over the batch."""
    pairs = zip(encoder_bands, decoder_bands, strict=True)
    return torch.stack([absolute_difference(a, b) / a.shape[0] for a, b in pairs]).sum()


def absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) - _wide(b)).abs().sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
