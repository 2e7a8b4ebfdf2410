# SPDX-License-Identifier: Apache-2.0
"""Sampling with fresh noise at every step: ancestral Euler steps for v-prediction, from zero terminal SNR.

With ``sigma = sqrt((1 - a) / a)`` the noisy latent is ``x = clean + sigma * noise``; the model sees
``x / sqrt(sigma^2 + 1)``, which is what it was trained on. Open-Sora Plan v1.3 takes 100 steps with guidance 7.5.
Follows EulerAncestralDiscreteScheduler of diffusers 0.30 (k-diffusion, arXiv 2206.00364; spacing: arXiv 2305.08891).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .guidance import guide
from .sampling import _join
from .v_prediction import open_sora_plan_alphas_cumprod

SPACINGS = ("trailing", "leading", "linspace")
LEAST_ALPHA = 2.0**-24  # stands for 0 at the last timestep: sigma 4096 instead of infinity


class EulerAncestralSchedule(NamedTuple):
    """``timesteps`` ``(num_steps,)``, ``sigmas`` ``(num_steps + 1,)`` with a final 0, both float32 and decreasing, and
    the standard deviation of the initial latents.
    """

    timesteps: Tensor
    sigmas: Tensor
    initial_std: float


def euler_ancestral_schedule(
    num_steps: int, alphas_cumprod: Tensor | None = None, *, spacing: str = "trailing"
) -> EulerAncestralSchedule:
    """Where the steps lie.

    Args:
        num_steps: 1 to the length of the table.
        alphas_cumprod: default: :func:`open_sora_plan_alphas_cumprod`. A final 0 becomes ``2 ** -24``.
        spacing: ``"trailing"`` from the last timestep in equal strides, which zero terminal SNR needs; ``"leading"``
            down to timestep 0; ``"linspace"`` both ends.

    Raises:
        ValueError: a number of steps or a spacing that does not exist.
    """
    table = open_sora_plan_alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
    table = table.detach().cpu().clone()
    count = len(table)
    if not 1 <= num_steps <= count:
        raise ValueError(f"euler_ancestral_schedule: num_steps must lie in 1..{count}, got {num_steps}")
    if table[-1] == 0:
        table[-1] = LEAST_ALPHA
    if spacing == "trailing":
        timesteps = (count - torch.arange(num_steps, dtype=torch.float64) * (count / num_steps)).round() - 1
    elif spacing == "leading":
        timesteps = torch.arange(num_steps, dtype=torch.float64).flip(0) * (count // num_steps)
    elif spacing == "linspace":
        timesteps = torch.linspace(0, count - 1, num_steps, dtype=torch.float64).flip(0)
    else:
        raise ValueError(f"euler_ancestral_schedule: spacing must be one of {SPACINGS}, got {spacing!r}")
    timesteps = timesteps.float()
    levels = ((1 - table) / table) ** 0.5
    sigmas = torch.cat((interpolate(levels.double(), timesteps.double()), torch.zeros(1))).float()
    largest = float(sigmas.max())
    return EulerAncestralSchedule(timesteps, sigmas, (largest**2 + 1) ** 0.5 if spacing == "leading" else largest)


def interpolate(values: Tensor, places: Tensor) -> Tensor:
    """Linearly between neighbouring entries of ``values``, at ``places`` within 0 and its last index."""
    below = places.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return values[below] + (values[above] - values[below]) * (places - below)


def scale_input(latents: Tensor, sigma: Tensor | float) -> Tensor:
    """``latents / sqrt(sigma^2 + 1)``: what the model sees."""
    return latents / (sigma**2 + 1) ** 0.5


def euler_ancestral_step(
    latents: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float, noise: Tensor
) -> Tensor:
    """One step down, in float32 (float64 stays float64), returned in the dtype of ``velocity``.

    ``clean = latents / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) * velocity``; then from sigma to
    ``down = sqrt(next^2 - up^2)`` along ``(latents - clean) / sigma``, and up again with ``up * noise``, where
    ``up = sqrt(next^2 (sigma^2 - next^2) / sigma^2)``.

    Args:
        latents, velocity, noise: of one shape; the velocity after guidance.
        sigma, next_sigma: ``sigma > next_sigma >= 0``.

    Raises:
        ValueError: shapes differ.
    """
    for name, tensor in (("velocity", velocity), ("noise", noise)):
        if tensor.shape != latents.shape:
            wanted = f"{tuple(latents.shape)} like latents"
            raise ValueError(f"euler_ancestral_step: {name} must be {wanted}, got {tuple(tensor.shape)}")
    wide = torch.promote_types(torch.promote_types(latents.dtype, velocity.dtype), torch.float32)
    start, end = (torch.as_tensor(level, device=latents.device, dtype=wide) for level in (sigma, next_sigma))
    x = latents.to(wide)
    clean = velocity.to(wide) * (-start / (start**2 + 1) ** 0.5) + x / (start**2 + 1)
    up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
    down = (end**2 - up**2) ** 0.5
    return (x + (x - clean) / start * (down - start) + noise.to(wide) * up).to(velocity.dtype)


@torch.no_grad()
def sample_euler_ancestral(
    model: Callable[..., Tensor],
    noise: Tensor,
    schedule: EulerAncestralSchedule,
    conditioning: Mapping[str, Tensor] | None = None,
    *,
    negative_conditioning: Mapping[str, Tensor] | None = None,
    given: Tensor | None = None,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    step_noises: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Clean latents from noise.

    Args:
        model: ``(latents, timestep, **conditioning) -> velocity`` of the shape of ``noise``; ``timestep`` is
            ``(batch,)`` float32 (the original rounds it to the model's dtype). Under guidance the batch is doubled,
            negative first.
        noise: standard normal ``(batch, channels, frames, height, width)``, in the dtype of the model.
        schedule: from :func:`euler_ancestral_schedule`.
        conditioning: keyword tensors for the model, each ``(batch, ...)``.
        negative_conditioning: the same names and shapes for the negative prompt; needed if ``guidance_scale > 1``.
        given: ``(batch, more channels, frames, height, width)`` behind the scaled latents in every call, not scaled,
            and the same in both halves: latent and mask of an inpainting model.
        guidance_scale: guidance happens only above 1.
        guidance_rescale: see ``rescale_guidance``.
        step_noises: one normal tensor like ``noise`` for each step; the last one has no effect.
        generator: draws them instead, on its device.
        on_step: called after each step as ``on_step(index, latents)``.

    Returns:
        Latents like ``noise``.

    Raises:
        ValueError: arguments do not fit, or the model returns another shape.
        FloatingPointError: the velocity is not finite; the message names the step.
    """
    where, num_steps = "sample_euler_ancestral", len(schedule.timesteps)
    if step_noises is not None and len(step_noises) != num_steps:
        raise ValueError(f"{where}: step_noises must be {num_steps}, one for each step, got {len(step_noises)}")
    if given is not None and (given.shape[:1] + given.shape[2:] != noise.shape[:1] + noise.shape[2:]):
        wanted = (noise.shape[0], "channels", *noise.shape[2:])
        raise ValueError(f"{where}: given must be {wanted}, got {tuple(given.shape)}")
    guided = guidance_scale > 1
    arguments = _join(negative_conditioning, conditioning, noise.shape[0]) if guided else dict(conditioning or {})
    levels, timesteps = (t.to(noise.device) for t in (schedule.sigmas, schedule.timesteps))
    latents = noise * schedule.initial_std
    for index in range(num_steps):
        inputs = scale_input(latents, levels[index]).to(noise.dtype)
        inputs = inputs if given is None else torch.cat([inputs, given.to(inputs)], 1)
        inputs = torch.cat([inputs, inputs]) if guided else inputs
        velocity = model(inputs, timesteps[index].expand(len(inputs)), **arguments)
        wanted_shape = (len(inputs), *latents.shape[1:])
        if tuple(velocity.shape) != wanted_shape:
            raise ValueError(f"{where}: model must return {wanted_shape}, got {tuple(velocity.shape)}")
        if guided:
            negative, positive = velocity.chunk(2)
            velocity = guide(negative, positive, guidance_scale, guidance_rescale)
        if not torch.isfinite(velocity).all():
            raise FloatingPointError(
                f"{where}: velocity is not finite at step {index} of {num_steps}, sigma {float(levels[index]):.6g}"
            )
        fresh = draw_like(latents, generator) if step_noises is None else step_noises[index]
        latents = euler_ancestral_step(latents, velocity, levels[index], levels[index + 1], fresh)
        if on_step is not None:
            on_step(index, latents)
    return latents


def draw_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal of the shape, dtype and device of ``x``, drawn on the generator's device."""
    source = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=source).to(x.device)
