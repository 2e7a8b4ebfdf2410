# SPDX-License-Identifier: Apache-2.0
"""Discrete diffusion with v-prediction: noise tables, mixing, targets and loss.

A table ``alphas_cumprod`` holds the signal's share of the variance at each of 1000 timesteps; 0 at the last one means
that pure noise is really reached (zero terminal SNR, arXiv 2305.08891). Used by Open-Sora Plan v1.3 and CogVideoX.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
