# SPDX-License-Identifier: Apache-2.0
"""Training side of flow matching: draw a noise level, mix data with noise, regress the velocity ``noise - data``.

Source: Open-Sora Plan v1.5 (commit 0d7decf), after SD3 (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .schedules import dynamic_shift, shift_sigmas

DENSITIES = ("logit_normal", "mode", "uniform")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


def logit_normal_sigmas(normal: Tensor) -> Tensor:
    """``sigmoid(normal)``: standard normal draws to noise levels in (0, 1)."""
    return torch.sigmoid(normal)


def mode_sigmas(uniform: Tensor, *, mode_scale: float = 1.29) -> Tensor:
    """``1 - u - mode_scale * (cos(pi*u/2)^2 - 1 + u)``: uniform draws to levels with heavier middle (SD3)."""
    return 1 - uniform - mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


def draw_sigmas(
    batch: int,
    density: str = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(batch,)`` float32 noise levels before any shift, drawn on the CPU so that every device sees the same ones.

    Args:
        density: "logit_normal" (``sigmoid(mean + std * normal)``), "mode" or "uniform".

    Raises:
        ValueError: unknown density, ``batch < 1`` or ``std <= 0``.
    """
    if batch < 1 or not std > 0:
        raise ValueError(f"draw_sigmas: batch and std must be positive, got {batch} and {std}")
    if density == "logit_normal":
        return logit_normal_sigmas(mean + std * torch.randn(batch, generator=generator))
    uniform = torch.rand(batch, generator=generator)
    if density == "mode":
        return mode_sigmas(uniform, mode_scale=mode_scale)
    if density == "uniform":
        return uniform
    raise ValueError(f"draw_sigmas: density must be one of {', '.join(DENSITIES)}, got {density!r}")


def loss_weights(sigmas: Tensor, weighting: str = "none") -> Tensor:
    """Weight of each sample's squared error: 1, ``sigma^-2`` ("sigma_sqrt") or ``2 / (pi*(1-2s+2s^2))`` ("cosmap").

    Raises:
        ValueError: unknown weighting.
    """
    if weighting == "none":
        return torch.ones_like(sigmas)
    if weighting == "sigma_sqrt":
        return sigmas**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    raise ValueError(f"loss_weights: weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """``sigma * noise + (1 - sigma) * latents``, computed in float32, returned in the dtype of ``latents``.

    Args:
        latents, noise: ``(batch, ...)`` of the same shape.
        sigmas: ``(batch,)``.
    """
    level = _per_sample(sigmas, latents)
    return (level * _wide(noise) + (1 - level) * _wide(latents)).to(latents.dtype)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid positions: ``sum(values*mask) / sum(mask)``, the mask repeated over the channels.

    Args:
        values: ``(batch, channels, frames, height, width)``.
        mask: ``(batch, frames, height, width)``, 1 = valid; None takes the plain mean.

    Raises:
        ValueError: shapes do not fit, or no position is valid.
    """
    if mask is None:
        return values.mean()
    batch, channels, *grid = values.shape
    if tuple(mask.shape) != (batch, *grid):
        raise ValueError(f"masked_mean: mask must be {(batch, *grid)}, got {tuple(mask.shape)}")
    weight = mask.to(values.dtype)
    total = weight.sum() * channels
    if total == 0:
        raise ValueError("masked_mean: mask has no valid position")
    return (values * weight.unsqueeze(1)).sum() / total


def flow_matching_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    sigmas: Tensor | None = None,
    density: str = "logit_normal",
    shift: float | None = None,
    sigma_eps: float = 0.0,
    weighting: str = "none",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``mean((model(x_t, 1000*sigma) - (noise - latents))^2)`` with ``x_t = sigma*noise + (1-sigma)*latents``.

    Args:
        model: ``(x_t, timestep) -> velocity``; text and masks are bound beforehand, e.g. with
            ``functools.partial``. ``x_t`` has the dtype of ``latents``, ``timestep`` is ``(batch,)`` float32.
        latents: clean latents ``(batch, channels, frames, height, width)``.
        mask: ``(batch, frames, height, width)``, 1 = valid latent position; padded positions do not count.
        noise: standard normal of the latents' shape; drawn if None.
        sigmas: ``(batch,)`` levels before the shift; drawn from ``density`` if None.
        shift: static shift; None takes ``dynamic_shift`` from the latent's height and width, as v1.5 trains.
        sigma_eps: floor of the shifted level.
        weighting: see ``loss_weights``; "none" goes with logit_normal.
        generator: CPU generator of the draws.

    Returns:
        Scalar float32 loss (float64 for float64 latents).

    Raises:
        ValueError: shapes do not fit.
    """
    if latents.dim() != 5:
        raise ValueError(
            f"flow_matching_loss: latents must be (batch, channels, frames, height, width), got {tuple(latents.shape)}"
        )
    batch, _, _, height, width = latents.shape
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    if sigmas is None:
        sigmas = draw_sigmas(batch, density, generator=generator)
    if noise.shape != latents.shape:
        raise ValueError(
            f"flow_matching_loss: noise must be {tuple(latents.shape)} like latents, got {tuple(noise.shape)}"
        )
    if tuple(sigmas.shape) != (batch,):
        raise ValueError(f"flow_matching_loss: sigmas must be ({batch},), got {tuple(sigmas.shape)}")
    if shift is None:
        shift = dynamic_shift(max(height * width // 4, 1))
    levels = shift_sigmas(sigmas.to(latents.device), shift, sigma_eps=sigma_eps)

    velocity = model(add_noise(latents, noise, levels), 1000 * levels)
    if velocity.shape != latents.shape:
        raise ValueError(f"flow_matching_loss: model must return {tuple(latents.shape)}, got {tuple(velocity.shape)}")
    error = (_wide(velocity) - (_wide(noise) - _wide(latents))) ** 2
    if weighting != "none":
        error = error * _per_sample(loss_weights(levels, weighting), error)
    return masked_mean(error, mask)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(device=like.device, dtype=dtype).view(-1, *([1] * (like.dim() - 1)))


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
