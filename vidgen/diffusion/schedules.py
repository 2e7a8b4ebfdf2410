# SPDX-License-Identifier: Apache-2.0
"""Noise levels (sigmas): 1 is pure noise, 0 is data. Shifts move the levels, schedules list them for a sampler.

Source: Open-Sora Plan v1.5 (``OpenSoraPlanScheduler``, commit 0d7decf); the dynamic shift is the one of SD3/FLUX.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dynamic_shift(
    num_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Resolution-dependent shift ``m = exp(mu)``, with ``mu`` linear in the number of tokens.

    ``mu = base_shift + (num_tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)``

    Args:
        num_tokens: spatial tokens of ONE frame. Open-Sora Plan v1.5 uses ``(latent_height * latent_width) // 4``
            and does not count frames, so a long video is shifted like an image of the same size.

    Raises:
        ValueError: ``num_tokens < 1`` or ``max_tokens`` equals ``base_tokens``.
    """
    if num_tokens < 1:
        raise ValueError(f"dynamic_shift: num_tokens must be at least 1, got {num_tokens}")
    if max_tokens == base_tokens:
        raise ValueError(f"dynamic_shift: max_tokens must differ from base_tokens, got {max_tokens} for both")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(num_tokens * slope + (base_shift - slope * base_tokens))


def shift_sigmas(sigmas: Tensor, shift: float, *, gamma: float = 1.0, sigma_eps: float = 0.0) -> Tensor:
    """``m / (m + (1/sigma - 1)^gamma)``, floored at ``sigma_eps``; for gamma 1 this is ``m*s / (1 + (m-1)*s)``.

    Args:
        sigmas: any shape, floating point, values in [0, 1].
        shift: ``m > 0``. Above 1 more time is spent near pure noise; 1 changes nothing.
        gamma: exponent, 1 in every released recipe.
        sigma_eps: smallest value returned, in [0, 0.01].

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: ``shift`` or ``gamma`` not positive, ``sigma_eps`` outside [0, 0.01].
    """
    if not shift > 0 or not gamma > 0:
        raise ValueError(f"shift_sigmas: shift and gamma must be positive, got {shift} and {gamma}")
    if not 0 <= sigma_eps <= 1e-2:
        raise ValueError(f"shift_sigmas: sigma_eps must lie in [0, 0.01], got {sigma_eps}")
    if gamma == 1.0:
        shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
    else:
        # sigma 0 gives 1/0 = inf and shift/inf = 0, which is the value wanted
        shifted = shift / (shift + (1 / sigmas - 1) ** gamma)
    return shifted.clamp(min=sigma_eps)


def shifted_linear_schedule(num_steps: int, shift: float = 1.0, *, sigma_eps: float = 0.0) -> Tensor:
    """``num_steps + 1`` sigmas from 1 to 0, evenly spaced and then shifted. float32, computed in float64.

    Open-Sora Plan v1.5 samples with ``shift=7.0``, or with ``shift=dynamic_shift(...)``; its own scheduler ignores
    a static shift that is not above 1, this function applies the one it is given.

    Raises:
        ValueError: ``num_steps < 1`` or a bad shift.
    """
    if num_steps < 1:
        raise ValueError(f"shifted_linear_schedule: num_steps must be at least 1, got {num_steps}")
    return shift_sigmas(_linspace(1.0, 0.0, num_steps + 1), shift, sigma_eps=sigma_eps).float()


def linear_quadratic_schedule(num_steps: int, *, approximate_steps: int | None = None) -> Tensor:
    """Small even steps near pure noise for the first half, quadratically growing ones for the second.

    With ``A = approximate_steps / 2`` and ``m = num_steps / 2`` the level after i steps is 1 minus

    * ``i / (2A)`` for ``i < m``,
    * ``a*i^2 + b*i + c`` for ``m <= i < 2m``, where ``a = (A-m)/(A*m^2)``, ``b = (5m-4A)/(2A*m)``, ``c = (A-m)/A``,
    * 1 at the end.

    Args:
        num_steps: even.
        approximate_steps: even, at least ``num_steps``: the fine linear schedule whose first steps are kept.
            Default ``min(max(10 * num_steps, 250), 1000)``. No shift is applied on top.

    Returns:
        ``(num_steps + 1,)`` float32, computed in float64.

    Raises:
        ValueError: odd or too small arguments.
    """
    if approximate_steps is None:
        approximate_steps = min(max(10 * num_steps, 250), 1000)
    if num_steps < 2 or num_steps % 2:
        raise ValueError(f"linear_quadratic_schedule: num_steps must be even and at least 2, got {num_steps}")
    if approximate_steps % 2 or approximate_steps < num_steps:
        raise ValueError(
            "linear_quadratic_schedule: approximate_steps must be even and at least num_steps "
            f"({num_steps}), got {approximate_steps}"
        )
    half, fine_half = num_steps // 2, approximate_steps // 2
    index = torch.arange(num_steps + 1, dtype=torch.float64)
    a = (fine_half - half) / (fine_half * half**2)
    b = (5 * half - 4 * fine_half) / (2 * fine_half * half)
    c = (fine_half - half) / fine_half
    progress = torch.where(index < half, index / (2 * fine_half), a * index**2 + b * index + c)
    progress[-1] = 1.0
    return (1 - progress).float()


def _linspace(start: float, stop: float, num: int) -> Tensor:
    # torch.linspace fills from both ends; start + i * step reproduces the numpy schedule to the last bit
    values = start + torch.arange(num, dtype=torch.float64) * ((stop - start) / (num - 1))
    values[-1] = stop
    return values
