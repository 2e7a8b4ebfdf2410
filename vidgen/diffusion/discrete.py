# SPDX-License-Identifier: Apache-2.0
"""Steps over the discrete timesteps of v-prediction from zero terminal SNR, as CogVideoX 1.0 and 1.5 take them.

A sampler walks down a list of :class:`Step`, which hold plain numbers: the two stacks that CogVideoX comes from differ
in these numbers only. :func:`diffusers_steps` reads the levels of one table; :func:`sat_steps` picks its timesteps
first and rescales the levels of those few to zero terminal SNR, while its denoiser goes by the full table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .v_prediction import rescale_zero_terminal_snr, scaled_linear_alphas_cumprod, shift_snr

SPACINGS = ("trailing", "leading", "linspace")


class Step(NamedTuple):
    """One step of a sampler; a level is the signal's share of the variance, ``alphas_cumprod`` of a timestep.

    Attributes:
        timestep: what the model is told.
        level: of the latents before the step.
        next_level: of the latents after it; 1 is clean.
        last_level: that the step before began with; None at the first.
        seen_level: with which a velocity becomes a clean latent.
        second_order: whether the multistep solver uses the clean latent of the step before.
        draws: how many tensors of noise the stochastic solver of the original draws; the last one is used.
    """

    timestep: int
    level: float
    next_level: float
    last_level: float | None
    seen_level: float
    second_order: bool
    draws: int


def cogvideox_alphas_cumprod(snr_shift: float = 1.0, num_train_steps: int = 1000) -> Tensor:
    """The float64 table of CogVideoX: scaled-linear, its SNR divided by ``snr_shift``, then zero at the end.

    ``snr_shift`` is 3 for 2B and 1 for all others.
    """
    shifted = shift_snr(scaled_linear_alphas_cumprod(num_train_steps), snr_shift)
    return rescale_zero_terminal_snr(shifted)


def spaced_timesteps(
    num_steps: int, spacing: str = "trailing", *, num_train_steps: int = 1000, offset: int = 0
) -> list[int]:
    """Timesteps of a sampler, decreasing (arXiv 2305.08891, table 2).

    Args:
        num_steps: 1 to ``num_train_steps``.
        spacing: ``"trailing"`` from the last timestep in equal strides, which zero terminal SNR needs; ``"leading"``
            down to timestep 0; ``"linspace"`` both ends.
        num_train_steps: of the table.
        offset: added to those of ``"leading"``.

    Raises:
        ValueError: a number of steps or a spacing that does not exist.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"spaced_timesteps: num_steps must lie in 1..{num_train_steps}, got {num_steps}")
    if spacing == "trailing":
        # The difference of the first two, as numpy.arange has it: halves are then rounded as in diffusers. For some
        # numbers of steps, such as 61, diffusers itself gets a last timestep of -1 beyond what was asked for.
        stride = num_train_steps - (num_train_steps - num_train_steps / num_steps)
        return [round(num_train_steps - i * stride) - 1 for i in range(num_steps)]
    if spacing == "leading":
        return [i * (num_train_steps // num_steps) + offset for i in reversed(range(num_steps))]
    if spacing == "linspace":
        stride = (num_train_steps - 1) / max(num_steps - 1, 1)
        return [round(i * stride) for i in reversed(range(num_steps))]
    raise ValueError(f"spaced_timesteps: spacing must be one of {SPACINGS}, got {spacing!r}")


def diffusers_steps(
    num_steps: int,
    alphas_cumprod: Tensor | None = None,
    *,
    spacing: str = "trailing",
    offset: int = 0,
    final_level: float = 1.0,
) -> list[Step]:
    """The steps of CogVideoXDDIMScheduler and CogVideoXDPMScheduler.

    Each goes down by ``len(table) // num_steps`` timesteps, which meets the next timestep only where ``num_steps``
    divides the table; the last one goes to ``final_level`` where that is below 0.

    Args:
        num_steps, spacing, offset: see :func:`spaced_timesteps`.
        alphas_cumprod: the table; default: :func:`cogvideox_alphas_cumprod` without shift.
        final_level: 1 (diffusers: ``set_alpha_to_one``) or the table's first entry.

    Raises:
        ValueError: as :func:`spaced_timesteps`; a timestep beyond the table.
    """
    table = cogvideox_alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
    levels = table.double().tolist()
    timesteps = spaced_timesteps(num_steps, spacing, num_train_steps=len(levels), offset=offset)
    if timesteps[0] >= len(levels) or timesteps[-1] < 0:
        raise ValueError(f"diffusers_steps: offset={offset} leads beyond the {len(levels)} timesteps of the table")
    stride = len(levels) // num_steps
    steps = []
    for i, timestep in enumerate(timesteps):
        target = timestep - stride
        second_order = i > 0 and target >= 0
        steps.append(
            Step(
                timestep,
                level=levels[timestep],
                next_level=levels[target] if target >= 0 else final_level,
                last_level=levels[timesteps[i - 1]] if i else None,
                seen_level=levels[timestep],
                second_order=second_order,
                draws=2 if second_order else 1,
            )
        )
    return steps


def sat_steps(num_steps: int, snr_shift: float = 1.0, *, num_train_steps: int = 1000) -> list[Step]:
    """The steps of SAT's VideoDDIMSampler and VPSDEDPMPP2MSampler, from float32 tables.

    Timesteps are ``int(linspace(999, 0, num_steps, endpoint excluded))``. The levels are those of the chosen timesteps,
    rescaled to zero terminal SNR among themselves; the clean latent is computed with the nearest level of the full
    table. At 50 steps the two differ by up to 1.2e-3. The last step draws no noise.

    Raises:
        ValueError: ``num_steps`` is not in 1 to ``num_train_steps`` or the shift is not positive.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"sat_steps: num_steps must lie in 1..{num_train_steps}, got {num_steps}")
    shifted = shift_snr(scaled_linear_alphas_cumprod(num_train_steps), snr_shift)
    stride = (num_train_steps - 1) / num_steps
    timesteps = [int(num_train_steps - 1 - i * stride) for i in range(num_steps)]
    if num_steps == num_train_steps:
        timesteps = [*reversed(range(num_train_steps))]
    roots = rescaled_roots(shifted[timesteps].flip(0)).flip(0)
    full = rescaled_roots(shifted)
    nearest = (roots[:, None] - full).abs().argmin(1)
    levels, seen = roots.double().square().tolist(), full[nearest].double().square().tolist()
    last = num_steps - 1
    return [
        Step(
            timestep,
            level=levels[i],
            next_level=levels[i + 1] if i < last else 1.0,
            last_level=levels[i - 1] if i else None,
            seen_level=seen[i],
            second_order=0 < i < last,
            draws=0 if i == last else min(i + 1, 2),
        )
        for i, timestep in enumerate(timesteps)
    ]


def rescaled_roots(alphas_cumprod: Tensor) -> Tensor:
    """Square roots moved linearly so that the last is 0 and the first stays, in float32 as SAT does."""
    roots = alphas_cumprod.float().sqrt()
    return (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))


def clean_latent(latents: Tensor, velocity: Tensor, level: float) -> Tensor:
    """``sqrt(a) * latents - sqrt(1 - a) * velocity``, in float32 (float64 stays float64)."""
    wide = torch.promote_types(torch.promote_types(latents.dtype, velocity.dtype), torch.float32)
    return math.sqrt(level) * latents.to(wide) - math.sqrt(1 - level) * velocity.to(wide)
