# SPDX-License-Identifier: Apache-2.0
"""Stochastic second-order multistep steps of v-prediction (DPM-Solver++ SDE, arXiv 2211.01095).

Follows CogVideoXDPMScheduler and SAT's VPSDEDPMPP2MSampler. Coefficients are plain float64 numbers; where the signal or
the noise is 0 the logarithm of the SNR is infinite, and they take the limits: from pure noise the latents are thrown
away, and the step to a clean latent returns it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .discrete import Step, clean_latent


class Coefficients(NamedTuple):
    """``latents * keep + clean * take + noise * stir``, with ``clean`` extrapolated by ``lead``."""

    keep: float
    take: float
    stir: float
    lead: float


def half_log_snr(level: float) -> float:
    """``log(a / (1 - a)) / 2``, with infinities at 0 and 1."""
    if level <= 0:
        return -math.inf
    return math.inf if level >= 1 else 0.5 * math.log(level / (1 - level))


def dpm_coefficients(step: Step) -> Coefficients:
    """With ``h = lambda_next - lambda`` and ``lambda = log(a / (1 - a)) / 2``:

    ``keep = sqrt((1 - a_next) / (1 - a)) exp(-h)``, ``take = sqrt(a_next) (1 - exp(-2h))``,
    ``stir = sqrt(1 - a_next) sqrt(1 - exp(-2h))``, and ``lead = h / (2 (lambda - lambda_last))``, or 0 for a step of
    first order.
    """
    now, after = half_log_snr(step.level), half_log_snr(step.next_level)
    h = after - now
    keep = math.sqrt((1 - step.next_level) / (1 - step.level)) * math.exp(-h)
    gone = -math.expm1(-2 * h)
    lead = 0.0
    if step.second_order and step.last_level is not None:
        lead = h / (2 * (now - half_log_snr(step.last_level)))  # 0 where the step before began with pure noise
    return Coefficients(keep, math.sqrt(step.next_level) * gone, math.sqrt((1 - step.next_level) * gone), lead)


def dpm_step(
    latents: Tensor, velocity: Tensor, step: Step, noise: Tensor | None, last_clean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step down: see :func:`dpm_coefficients`.

    Args:
        latents, velocity: of one shape; the velocity after guidance.
        step: see :class:`Step`.
        noise: standard normal of that shape; None where the step needs none.
        last_clean: what the step before returned beside its latents; needed by second-order steps.

    Returns:
        The latents after the step, and the clean latents that the velocity implies, both in float32 (or float64).

    Raises:
        ValueError: shapes differ, or noise or ``last_clean`` is missing.
    """
    coefficients = dpm_coefficients(step)
    for name, tensor, needed in (
        ("velocity", velocity, True),
        ("noise", noise, coefficients.stir != 0),
        ("last_clean", last_clean, step.second_order),
    ):
        if tensor is None and needed:
            raise ValueError(f"dpm_step: {name} is needed at timestep {step.timestep}, got None")
        if tensor is not None and tensor.shape != latents.shape:
            raise ValueError(f"dpm_step: {name} must be {tuple(latents.shape)} like latents, got {tuple(tensor.shape)}")
    clean = clean_latent(latents, velocity, step.seen_level)
    aim = clean
    if last_clean is not None and step.second_order:
        aim = (1 + coefficients.lead) * clean - coefficients.lead * last_clean
    result = coefficients.keep * latents.to(clean.dtype) + coefficients.take * aim
    if noise is not None:
        result = result + coefficients.stir * noise.to(clean.dtype)
    return result, clean
