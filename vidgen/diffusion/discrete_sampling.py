# SPDX-License-Identifier: Apache-2.0
"""The sampling loop of CogVideoX: deterministic or stochastic steps down a list of timesteps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .ddim import ddim_step
from .discrete import Step
from .dpm import dpm_step
from .guidance import dynamic_guidance_scale, guide
from .sampling import _join


def draw_noise(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal ``(batch, channels, frames, height, width)``, drawn in CogVideoX's order: frames before channels.

    It is drawn on the generator's device (else the processor), so that a seed gives the noise of the originals.

    Raises:
        ValueError: another number of axes.
    """
    if len(shape) != 5:
        raise ValueError(f"draw_noise: shape must be (batch, channels, frames, height, width), got {tuple(shape)}")
    batch, channels, frames, height, width = shape
    source = "cpu" if generator is None else generator.device
    noise = torch.randn((batch, frames, channels, height, width), generator=generator, dtype=dtype, device=source)
    return noise.to(device).transpose(1, 2)


@torch.no_grad()
def sample_discrete(
    model: Callable[..., Tensor],
    latents: Tensor,
    steps: Sequence[Step],
    conditioning: Mapping[str, Tensor] | None = None,
    *,
    negative_conditioning: Mapping[str, Tensor] | None = None,
    solver: str = "ddim",
    guidance_scale: float = 1.0,
    dynamic_guidance: bool = False,
    generator: torch.Generator | None = None,
    draw: Callable[[], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Walk from noise to a clean latent.

    Args:
        model: ``(latents, timestep, **conditioning) -> velocity`` of the latents' shape; ``timestep`` is ``(batch,)``
            int64. Under guidance the batch is doubled: ``[latents, latents]`` with ``[negative, positive]``.
        latents: standard normal ``(batch, channels, frames, height, width)``, :func:`draw_noise`. Kept in float32 (or
            float64) between steps; the model is given its own dtype by the caller.
        steps: from :func:`diffusers_steps` or :func:`sat_steps`.
        conditioning: keyword tensors for the model, each ``(batch, ...)``, such as the text and an image's latent.
        negative_conditioning: the same names and shapes for the negative prompt; needed if ``guidance_scale > 1``.
        solver: ``"ddim"`` or ``"dpm"`` (:mod:`vidgen.diffusion.ddim`, :mod:`vidgen.diffusion.dpm`).
        guidance_scale: guidance happens only above 1 (release: 6).
        dynamic_guidance: let the scale follow the timestep, see :func:`dynamic_guidance_scale`.
        generator: of the noise that "dpm" draws.
        draw: gives that noise instead, of the latents' shape.
        on_step: called after each step as ``on_step(index, latents)``.

    Returns:
        Clean latents, scaled as the model knows them, in float32 (or float64).

    Raises:
        ValueError: arguments do not fit, or the model returns another shape.
        FloatingPointError: the velocity is not finite; the message names the step.
    """
    if not steps:
        raise ValueError("sample_discrete: steps must have at least one step, got none")
    if solver not in ("ddim", "dpm"):
        raise ValueError(f"sample_discrete: solver must be 'ddim' or 'dpm', got {solver!r}")
    guided = guidance_scale > 1
    arguments = _join(negative_conditioning, conditioning, latents.shape[0]) if guided else dict(conditioning or {})
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    if draw is None:

        def draw() -> Tensor:
            return draw_noise(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    last_clean: Tensor | None = None
    for index, step in enumerate(steps):
        inputs = torch.cat([x, x]) if guided else x
        timestep = torch.full((inputs.shape[0],), step.timestep, dtype=torch.int64, device=x.device)
        velocity = model(inputs, timestep, **arguments)
        if velocity.shape != inputs.shape:
            raise ValueError(f"sample_discrete: model must return {tuple(inputs.shape)}, got {tuple(velocity.shape)}")
        velocity = velocity.to(x.dtype)
        if guided:
            scale = guidance_scale
            if dynamic_guidance:
                scale = dynamic_guidance_scale(guidance_scale, step.timestep, len(steps))
            negative, positive = velocity.chunk(2)
            velocity = guide(negative, positive, scale)
        if not torch.isfinite(velocity).all():
            raise FloatingPointError(
                f"sample_discrete: velocity is not finite at step {index} of {len(steps)}, timestep {step.timestep}"
            )
        if solver == "ddim":
            x, _ = ddim_step(x, velocity, step)
        else:
            noise = None
            for _ in range(step.draws):
                noise = draw()
            x, last_clean = dpm_step(x, velocity, step, noise, last_clean)
        if on_step is not None:
            on_step(index, x)
    return x
