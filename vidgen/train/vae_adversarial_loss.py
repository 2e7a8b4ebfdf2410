# SPDX-License-Identifier: Apache-2.0
"""Losses of a WFVAE that is trained against a discriminator (Open-Sora Plan v1.3, LPIPSWithDiscriminator3D).

The generator and the discriminator take turns. The weight of the adversarial term follows the gradients at the last
layer of the decoder (VQGAN, arXiv 2012.09841, eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.models.autoencoders.wfvae import WFVAEOutput

from .vae_loss import band_difference, kl_divergence

LARGEST_ADVERSARIAL_WEIGHT = 1e4
GRADIENT_FLOOR = 1e-4


@dataclass(frozen=True)
class AdversarialLossConfig:
    """Weights of the terms of :func:`generator_loss`; the defaults are those of Open-Sora Plan v1.3.

    Args:
        kl_weight, wavelet_weight: as in ``VAELossConfig``.
        perceptual_weight: of a perceptual distance of each frame, added to each of its elements.
        adversarial_weight: times the adaptive weight.
        adversarial_start: step from which on there is an adversarial term, and the discriminator is trained.
        distance: of pixels, absolute or squared.
        logvar: log of the variance that the reconstruction is scaled by; the original never trains it.

    Raises:
        ValueError: a negative weight or start, or an unknown distance.
    """

    kl_weight: float = 1e-6
    wavelet_weight: float = 0.1
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.5
    adversarial_start: int = 0
    distance: Literal["l1", "l2"] = "l1"
    logvar: float = 0.0

    def __post_init__(self) -> None:
        names = ("kl_weight", "wavelet_weight", "perceptual_weight", "adversarial_weight", "adversarial_start")
        negative = [f"{name}={getattr(self, name)}" for name in names if not getattr(self, name) >= 0]
        if negative:
            raise ValueError(f"AdversarialLossConfig: weights must not be negative, got {', '.join(negative)}")
        if self.distance not in ("l1", "l2"):
            raise ValueError(f"AdversarialLossConfig: distance must be 'l1' or 'l2', got {self.distance!r}")


def trains_discriminator(step: int, config: AdversarialLossConfig) -> bool:
    """Whether step number ``step``, from 0, is the discriminator's: every odd one from ``adversarial_start`` on."""
    return step % 2 == 1 and step >= config.adversarial_start


def generator_loss(
    output: WFVAEOutput,
    video: Tensor,
    discriminator: nn.Module,
    last_layer: Tensor,
    step: int,
    config: AdversarialLossConfig | None = None,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``reconstruction + kl_weight * kl + weight * adversarial + wavelet_weight * wavelet``.

    With a batch of B videos of T frames and the distance r of each element::

        reconstruction = sum (r * exp(-logvar) + logvar) / (B T)
        adversarial    = -mean(discriminator(output.reconstruction))
        weight         = adversarial_weight * clamp(|d reconstruction| / (|d adversarial| + 1e-4), 0, 1e4)

    where ``d`` is the gradient at ``last_layer``. The other terms are those of :func:`vae_loss`.

    Args:
        output: what ``WFVAE.forward`` returned for ``video``.
        video: ``(batch, 3, frames, height, width)`` in [-1, 1].
        discriminator: video to logits.
        last_layer: a weight that the whole reconstruction goes through, ``vae.decoder.conv_out.weight``.
        step: number of the training step.
        config: the weights.
        perceptual: ``(frames, reconstructed frames)``, each ``(batch * frames, 3, height, width)``, to a distance for
            each, with ``batch * frames`` values; needed if ``perceptual_weight > 0``.

    Returns:
        The scalar loss and its unweighted terms and the adaptive weight, detached, by name; float32 at least.

    Raises:
        ValueError: another shape of the video, or no perceptual distance where it has a weight.
    """
    config = config or AdversarialLossConfig()
    if output.reconstruction.shape != video.shape:
        wanted = tuple(output.reconstruction.shape)
        raise ValueError(f"generator_loss: video must be {wanted} like the reconstruction, got {tuple(video.shape)}")
    if config.perceptual_weight > 0 and perceptual is None:
        raise ValueError("generator_loss: perceptual_weight > 0 needs perceptual, got None")
    batch, frames = video.shape[0], video.shape[2]
    wide = torch.promote_types(video.dtype, torch.float32)
    difference = (video.to(wide) - output.reconstruction.to(wide)).abs()
    distance = difference if config.distance == "l1" else difference.square()
    if config.perceptual_weight > 0 and perceptual is not None:
        pair = (t.transpose(1, 2).flatten(0, 1) for t in (video, output.reconstruction))
        of_frames = perceptual(*pair).to(wide).view(batch, 1, frames, 1, 1)
        distance = distance + config.perceptual_weight * of_frames
    variance = torch.tensor(config.logvar, dtype=wide, device=video.device)
    terms = {
        "reconstruction": (distance * (-variance).exp() + variance).sum() / (batch * frames),
        "kl": kl_divergence(output.mean, output.logvar),
        "wavelet": band_difference(output.encoder_bands, output.decoder_bands),
        "adversarial": torch.zeros((), dtype=wide, device=video.device),
        "adversarial_weight": torch.zeros((), dtype=wide, device=video.device),
    }
    if step >= config.adversarial_start and config.adversarial_weight > 0:
        terms["adversarial"] = -discriminator(output.reconstruction).to(wide).mean()
        balance = adaptive_weight(terms["reconstruction"], terms["adversarial"], last_layer)
        terms["adversarial_weight"] = config.adversarial_weight * balance
    loss = (
        terms["reconstruction"]
        + config.kl_weight * terms["kl"]
        + terms["adversarial_weight"] * terms["adversarial"]
        + config.wavelet_weight * terms["wavelet"]
    )
    return loss, {name: term.detach() for name, term in terms.items()}


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """``|d reconstruction| / (|d adversarial| + 1e-4)`` at the last layer, at most 1e4, detached."""
    ours, theirs = (
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].float().norm()
        for term in (reconstruction, adversarial)
    )
    return (ours / (theirs + GRADIENT_FLOOR)).clamp(0, LARGEST_ADVERSARIAL_WEIGHT).detach()


def discriminator_loss(
    discriminator: nn.Module, video: Tensor, reconstruction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hinge loss ``(mean relu(1 - D(video)) + mean relu(1 + D(reconstruction))) / 2``.

    Args:
        discriminator: video to logits, in training mode.
        video, reconstruction: of one shape; no gradient reaches them.

    Returns:
        The scalar loss, and the mean logits ``real`` and ``reconstructed``, detached; float32 at least.
    """
    wide = torch.promote_types(video.dtype, torch.float32)
    real, fake = (discriminator(t.detach()).to(wide) for t in (video, reconstruction))
    loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return loss, {"real": real.mean().detach(), "reconstructed": fake.mean().detach()}
