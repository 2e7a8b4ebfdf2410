# SPDX-License-Identifier: Apache-2.0
"""Discrete diffusion with v-prediction: noise tables, mixing, targets and loss.

A table ``alphas_cumprod`` holds the signal's share of the variance at each of 1000 timesteps; 0 at the last one means
that pure noise is really reached (zero terminal SNR, arXiv 2305.08891). Used by Open-Sora Plan v1.3 and CogVideoX.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .flow_matching import masked_mean


def linear_alphas_cumprod(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(num_steps,)`` products of ``1 - beta`` with beta evenly spaced (DDPM, arXiv 2006.11239)."""
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, num_steps, dtype=dtype), dim=0)


def scaled_linear_alphas_cumprod(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(num_steps,)`` products of ``1 - beta`` with the square root of beta evenly spaced (latent diffusion)."""
    root = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=dtype)
    return torch.cumprod(1 - root**2, dim=0)


def shift_snr(alphas_cumprod: Tensor, shift: float) -> Tensor:
    """Divide the signal-to-noise ratio by ``shift``: ``a / (shift + (1 - shift) * a)``."""
    if not shift > 0:
        raise ValueError(f"shift_snr: shift must be positive, got {shift}")
    return alphas_cumprod / (shift + (1 - shift) * alphas_cumprod)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Move the square roots linearly so that the first stays and the last becomes 0 (arXiv 2305.08891, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


def signal_and_noise(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``sqrt(a_t)`` and ``sqrt(1 - a_t)`` per sample, shaped to multiply ``like`` ``(batch, ...)``.

    Computed in the table's dtype and returned in float32 (float64 for float64 ``like``).
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    level = alphas_cumprod.to(like.device)[timesteps.to(like.device)]
    shape = (-1,) + (1,) * (like.dim() - 1)
    return level.sqrt().to(wide).view(shape), (1 - level).sqrt().to(wide).view(shape)


def diffuse(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """``sqrt(a_t) * clean + sqrt(1 - a_t) * noise`` in float32, returned in the dtype of ``clean``.

    Args:
        clean, noise: ``(batch, ...)`` of one shape.
        timesteps: ``(batch,)`` integers, indices into the table.
    """
    signal, spread = signal_and_noise(alphas_cumprod, timesteps, clean)
    return (signal * clean.to(signal.dtype) + spread * noise.to(signal.dtype)).to(clean.dtype)


def velocity_target(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """``v = sqrt(a_t) * noise - sqrt(1 - a_t) * clean`` in float32 (arXiv 2202.00512)."""
    signal, spread = signal_and_noise(alphas_cumprod, timesteps, clean)
    return signal * noise.to(signal.dtype) - spread * clean.to(signal.dtype)


def clean_from_velocity(noisy: Tensor, velocity: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """``sqrt(a_t) * noisy - sqrt(1 - a_t) * v`` in float32: the clean latent that a velocity implies."""
    signal, spread = signal_and_noise(alphas_cumprod, timesteps, noisy)
    return signal * noisy.to(signal.dtype) - spread * velocity.to(signal.dtype)


def open_sora_plan_alphas_cumprod(schedule: str = "linear") -> Tensor:
    """The ``(1000,)`` float32 table of Open-Sora Plan v1.3, zero at the end.

    Rescaled as above, split into its 1000 betas and multiplied again, all in float32 like the original: rounding shows
    in the smallest entries, where sampling starts.

    Args:
        schedule: ``"linear"`` (1e-4 to 0.02, released) or ``"scaled_linear"`` (0.00085 to 0.012).

    Raises:
        ValueError: another schedule.
    """
    tables = {"linear": linear_alphas_cumprod, "scaled_linear": scaled_linear_alphas_cumprod}
    if schedule not in tables:
        raise ValueError(f"open_sora_plan_alphas_cumprod: schedule must be one of {sorted(tables)}, got {schedule!r}")
    rescaled = rescale_zero_terminal_snr(tables[schedule](dtype=torch.float32))
    betas = 1 - torch.cat((rescaled[:1], rescaled[1:] / rescaled[:-1]))
    return torch.cumprod(1 - betas, dim=0)


def signal_to_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """``a_t / (1 - a_t)`` at each of the timesteps."""
    level = alphas_cumprod.to(timesteps.device)[timesteps]
    return level / (1 - level)


def min_snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float) -> Tensor:
    """``min(snr_t, gamma) / (snr_t + 1)``, the weight of a velocity's squared error (arXiv 2303.09556).

    It is 0 where no signal is left: such a sample then teaches nothing.

    Raises:
        ValueError: ``gamma`` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr_weights: gamma must be positive, got {gamma}")
    snr = signal_to_noise(alphas_cumprod, timesteps)
    return snr.clamp(max=gamma) / (snr + 1)


def draw_timesteps(
    batch: int,
    *,
    num_steps: int = 1000,
    rank: int = 0,
    num_ranks: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(batch,)`` int64, uniform over one rank's share of the timesteps, drawn on the CPU.

    Rank r of n draws ``round(u)`` with u uniform between ``num_steps * r / n - 0.5`` and ``num_steps * (r + 1) / n -
    0.5``, so that the ranks together cover all timesteps at each step.

    Raises:
        ValueError: ``rank`` is not one of ``num_ranks``.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"draw_timesteps: rank must lie in 0..{num_ranks - 1}, got {rank}")
    uniform = torch.rand(batch, generator=generator, dtype=torch.float64)
    drawn = (num_steps * (rank + uniform) / num_ranks - 0.5).round()
    return drawn.clamp(0, num_steps - 1).long()


def offset_noise(noise: Tensor, strength: float, draws: Tensor | None = None) -> Tensor:
    """``noise + strength * draws``: one normal number for each sample and channel shifts its mean.

    Args:
        noise: ``(batch, channels, ...)``.
        strength: 0 leaves the noise alone.
        draws: ``(batch, channels)`` or with further axes of size 1; drawn if None.

    Raises:
        ValueError: ``draws`` has another shape.
    """
    batch, channels = noise.shape[:2]
    if draws is None:
        draws = torch.randn(batch, channels, device=noise.device, dtype=noise.dtype)
    if draws.numel() != batch * channels or tuple(draws.shape[:2]) != (batch, channels):
        raise ValueError(f"offset_noise: draws must be {(batch, channels)}, got {tuple(draws.shape)}")
    return noise + strength * draws.view(batch, channels, *[1] * (noise.dim() - 2))


def v_prediction_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    alphas_cumprod: Tensor,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``mean(weight_t * (model(x_t, t) - v)^2)`` with ``x_t`` of :func:`diffuse` and v of :func:`velocity_target`.

    Args:
        model: ``(x_t, timestep) -> velocity``; text, masks and what an inpainting model is given besides are bound
            beforehand. ``x_t`` has the dtype of ``latents``, ``timestep`` is that of ``timesteps``.
        latents: clean latents ``(batch, channels, frames, height, width)``.
        alphas_cumprod: the table of all timesteps, e.g. :func:`open_sora_plan_alphas_cumprod`.
        mask: ``(batch, frames, height, width)``, 1 = valid latent position; the others do not count.
        noise: of the latents' shape; drawn if None, with ``noise_offset``.
        timesteps: ``(batch,)`` integers; drawn uniformly if None.
        snr_gamma: see :func:`min_snr_weights`; None weighs all timesteps alike. Open-Sora Plan v1.3 trains text to
            video with 5 and inpainting without.
        noise_offset: see :func:`offset_noise`.
        generator: CPU generator of the draws.

    Returns:
        Scalar float32 loss (float64 for float64 latents).

    Raises:
        ValueError: shapes do not fit.
    """
    batch = latents.shape[0]
    if latents.dim() != 5:
        wanted = "(batch, channels, frames, height, width)"
        raise ValueError(f"v_prediction_loss: latents must be {wanted}, got {tuple(latents.shape)}")
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator)
        if noise_offset:
            noise = offset_noise(noise, noise_offset, torch.randn(latents.shape[:2], generator=generator))
        noise = noise.to(latents)
    if timesteps is None:
        timesteps = draw_timesteps(batch, num_steps=len(alphas_cumprod), generator=generator)
    for name, tensor, shape in (("noise", noise, latents.shape), ("timesteps", timesteps, (batch,))):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"v_prediction_loss: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    timesteps = timesteps.to(latents.device)

    velocity = model(diffuse(latents, noise, alphas_cumprod, timesteps), timesteps)
    if velocity.shape != latents.shape:
        raise ValueError(f"v_prediction_loss: model must return {tuple(latents.shape)}, got {tuple(velocity.shape)}")
    target = velocity_target(latents, noise, alphas_cumprod, timesteps)
    error = (velocity.to(target.dtype) - target) ** 2
    if snr_gamma is not None:
        weights = min_snr_weights(alphas_cumprod, timesteps, snr_gamma).to(error.dtype)
        error = error * weights.view(-1, 1, 1, 1, 1)
    return masked_mean(error, mask)
