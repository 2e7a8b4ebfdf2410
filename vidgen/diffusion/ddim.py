# SPDX-License-Identifier: Apache-2.0
"""Deterministic steps of v-prediction (DDIM, arXiv 2010.02502), as CogVideoXDDIMScheduler and SAT take them."""

from __future__ import annotations

import math

from torch import Tensor

from .discrete import Step, clean_latent


def ddim_step(latents: Tensor, velocity: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """``s * latents + (sqrt(a_next) - sqrt(a) * s) * clean`` with ``s = sqrt((1 - a_next) / (1 - a))``.

    Args:
        latents, velocity: of one shape; the velocity after guidance.
        step: see :class:`Step`.

    Returns:
        The latents after the step, and the clean latents that the velocity implies, both in float32 (or float64).

    Raises:
        ValueError: shapes differ.
    """
    if velocity.shape != latents.shape:
        raise ValueError(
            f"ddim_step: velocity must be {tuple(latents.shape)} like latents, got {tuple(velocity.shape)}"
        )
    clean = clean_latent(latents, velocity, step.seen_level)
    spread = math.sqrt((1 - step.next_level) / (1 - step.level))
    signal = math.sqrt(step.next_level) - math.sqrt(step.level) * spread
    return spread * latents.to(clean.dtype) + signal * clean, clean
