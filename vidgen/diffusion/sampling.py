# SPDX-License-Identifier: Apache-2.0
"""Sampling: follow the model's velocity from noise to data with Euler steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .guidance import guide


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """``latents + (next_sigma - sigma) * velocity``, computed in float32, returned in the dtype of ``velocity``."""
    if velocity.dtype == torch.float64:
        return latents + (next_sigma - sigma) * velocity
    return (latents.float() + (next_sigma - sigma) * velocity.float()).to(velocity.dtype)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    latents: Tensor,
    sigmas: Tensor,
    conditioning: Mapping[str, Tensor] | None = None,
    *,
    negative_conditioning: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate ``dx/dsigma = model(x, 1000*sigma)`` from ``sigmas[0]`` to ``sigmas[-1]``.

    Args:
        model: ``(latents, timestep, **conditioning) -> velocity`` of the latents' shape; ``timestep`` is ``(batch,)``
            float32. Under guidance the batch is doubled: ``[latents, latents]`` with ``[negative, positive]``.
        latents: initial noise ``(batch, channels, frames, height, width)``, any number of axes works.
        sigmas: ``(num_steps + 1,)`` decreasing levels, from a schedule of ``vidgen.diffusion``.
        conditioning: keyword tensors for the model, each ``(batch, ...)``.
        negative_conditioning: the same names and shapes for the negative prompt; needed if ``guidance_scale > 1``.
        guidance_scale: guidance happens only above 1, as in Open-Sora Plan v1.5 (release: 8.0).
        guidance_rescale: see ``rescale_guidance`` (release: 0.7).
        on_step: called after each step as ``on_step(index, latents)``, index from 0 to ``num_steps - 1``.

    Returns:
        Latents at ``sigmas[-1]``, in the dtype of the model's output.

    Raises:
        ValueError: arguments do not fit, or the model returns another shape.
        FloatingPointError: the velocity is not finite; the message names the step.
    """
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"sample: sigmas must be (num_steps + 1,) with num_steps >= 1, got {tuple(sigmas.shape)}")
    guided = guidance_scale > 1
    arguments = _join(negative_conditioning, conditioning, latents.shape[0]) if guided else dict(conditioning or {})
    levels = sigmas.to(device=latents.device, dtype=torch.float32)

    num_steps = len(levels) - 1
    for index in range(num_steps):
        inputs = torch.cat([latents, latents]) if guided else latents
        velocity = model(inputs, (levels[index] * 1000).expand(inputs.shape[0]), **arguments)
        if velocity.shape != inputs.shape:
            raise ValueError(f"sample: model must return {tuple(inputs.shape)}, got {tuple(velocity.shape)}")
        if guided:
            negative, positive = velocity.chunk(2)
            velocity = guide(negative, positive, guidance_scale, guidance_rescale)
        if not torch.isfinite(velocity).all():
            raise FloatingPointError(
                f"sample: velocity is not finite at step {index} of {num_steps}, sigma {float(levels[index]):.6g}"
            )
        latents = euler_step(latents, velocity, levels[index], levels[index + 1])
        if on_step is not None:
            on_step(index, latents)
    return latents


def _join(
    negative: Mapping[str, Tensor] | None, positive: Mapping[str, Tensor] | None, batch: int
) -> dict[str, Tensor]:
    """Concatenate negative and positive conditioning along the batch, name by name."""
    if not positive or not negative:
        raise ValueError("sample: guidance_scale > 1 needs both conditioning and negative_conditioning")
    if positive.keys() != negative.keys():
        raise ValueError(
            "sample: negative_conditioning must name the same tensors as conditioning "
            f"({', '.join(sorted(positive))}), got {', '.join(sorted(negative))}"
        )
    for name, value in positive.items():
        if value.shape != negative[name].shape or value.shape[:1] != (batch,):
            raise ValueError(
                f"sample: {name} must have batch {batch} and one shape in conditioning and negative_conditioning, "
                f"got {tuple(value.shape)} and {tuple(negative[name].shape)}"
            )
    return {name: torch.cat([negative[name], value]) for name, value in positive.items()}
