# SPDX-License-Identifier: Apache-2.0
"""What CogVideoX is trained with, and how an image becomes a condition of it.

Sources: THUDM/CogVideo ``sat/sgm/modules/diffusionmodules/loss.py``, ``sat/diffusion_video.py``, and the pipelines of
diffusers. Latents are ``(batch, channels, frames, height, width)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .v_prediction import clean_from_velocity, diffuse


def cogvideox_losses(
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    kind: str = "l2",
    min_snr_value: float | None = None,
) -> Tensor:
    """Of each sample, ``mean(w * |clean - latents| ** 2)``: ``clean`` is what the model's velocity implies.

    ``w = 1 / (1 - a_t)``, so that without options this is exactly the mean squared error of the velocity.

    Args:
        model: ``(x_t, timestep) -> velocity``; text and images are bound beforehand. ``x_t`` has the dtype of
            ``latents``.
        latents: clean latents.
        alphas_cumprod: the table, e.g. :func:`cogvideox_alphas_cumprod`.
        timesteps: ``(batch,)`` integers.
        noise: of the latents' shape, :func:`draw_training_noise`.
        kind: ``"l2"`` or ``"l1"`` (the absolute error, with the same weight).
        min_snr_value: w is at most this. SAT's own line for it runs with one sample only.

    Returns:
        ``(batch,)`` float32 (float64 for float64 latents).

    Raises:
        ValueError: shapes do not fit, another kind, or a bound that is not positive.
    """
    if latents.dim() != 5:
        wanted = "(batch, channels, frames, height, width)"
        raise ValueError(f"cogvideox_losses: latents must be {wanted}, got {tuple(latents.shape)}")
    for name, tensor, shape in (("noise", noise, latents.shape), ("timesteps", timesteps, latents.shape[:1])):
        if tensor.shape != shape:
            raise ValueError(f"cogvideox_losses: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if kind not in ("l2", "l1"):
        raise ValueError(f"cogvideox_losses: kind must be 'l2' or 'l1', got {kind!r}")
    if min_snr_value is not None and not min_snr_value > 0:
        raise ValueError(f"cogvideox_losses: min_snr_value must be positive, got {min_snr_value}")
    wide = torch.promote_types(latents.dtype, torch.float32)
    noisy = diffuse(latents.to(wide), noise.to(wide), alphas_cumprod, timesteps)
    velocity = model(noisy.to(latents.dtype), timesteps)
    if velocity.shape != latents.shape:
        raise ValueError(f"cogvideox_losses: model must return {tuple(latents.shape)}, got {tuple(velocity.shape)}")
    clean = clean_from_velocity(noisy, velocity, alphas_cumprod, timesteps)
    error = clean - latents.to(wide)
    error = error.square() if kind == "l2" else error.abs()
    weight = 1 / (1 - alphas_cumprod.to(latents.device)[timesteps.to(latents.device)])
    weight = weight if min_snr_value is None else weight.clamp(max=min_snr_value)
    return error.flatten(1).mean(1) * weight.to(wide)


def draw_training_noise(
    latents: Tensor, *, offset_noise_level: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal of the latents' shape, drawn on the CPU in float32; with an offset, one more normal number
    times ``offset_noise_level`` is added to all of a sample (SAT; 0 in every release).
    """
    noise = torch.randn(latents.shape, generator=generator)
    if offset_noise_level:
        shifts = torch.randn(latents.shape[0], generator=generator)
        noise = noise + offset_noise_level * shifts.view(-1, 1, 1, 1, 1)
    return noise.to(latents.device)


def cogvideox_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    alphas_cumprod: Tensor,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    kind: str = "l2",
    min_snr_value: float | None = None,
    offset_noise_level: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean of :func:`cogvideox_losses`, with timesteps drawn uniformly and noise drawn if they are None.

    Raises:
        ValueError: as :func:`cogvideox_losses`.
    """
    if timesteps is None:
        timesteps = torch.randint(0, len(alphas_cumprod), latents.shape[:1], generator=generator)
    if noise is None:
        noise = draw_training_noise(latents, offset_noise_level=offset_noise_level, generator=generator)
    return cogvideox_losses(
        model,
        latents,
        alphas_cumprod=alphas_cumprod,
        timesteps=timesteps.to(latents.device),
        noise=noise,
        kind=kind,
        min_snr_value=min_snr_value,
    ).mean()


def draw_grouped_timesteps(
    batch: int, *, group: int = 0, num_groups: int = 1, num_steps: int = 1000, generator: torch.Generator | None = None
) -> Tensor:
    """``(batch,)`` int64, uniform over one group's share of the timesteps: SAT's ``uniform_sampling``.

    Ranks are divided into groups (40 for 1.5), and group g of n draws from ``[g * k, (g + 1) * k)`` with
    ``k = num_steps // n``.

    Raises:
        ValueError: ``group`` is not one of ``num_groups``, or there are more groups than timesteps.
    """
    if not 0 <= group < num_groups <= num_steps:
        raise ValueError(
            f"draw_grouped_timesteps: group must lie in 0..{num_groups - 1} and num_groups in 1..{num_steps}, got "
            f"{group} of {num_groups}"
        )
    share = num_steps // num_groups
    return torch.randint(group * share, (group + 1) * share, (batch,), generator=generator)


# Image to video


def latent_frames(num_frames: int, *, frames_per_latent: int = 4, patch_size_t: int | None = None) -> tuple[int, int]:
    """Latent frames to sample for a video, and how many of them, at the beginning, are padding to be dropped.

    1.5 works on pairs of latent frames: 81 frames are 21 latent frames, sampled as 22, of which the first is dropped.

    Raises:
        ValueError: ``num_frames`` is not positive.
    """
    if num_frames < 1:
        raise ValueError(f"latent_frames: num_frames must be at least 1, got {num_frames}")
    frames = (num_frames - 1) // frames_per_latent + 1
    padding = 0 if patch_size_t is None else -frames % patch_size_t
    return frames + padding, padding


def image_latents(image: Tensor, frames: int, *, patch_size_t: int | None = None) -> Tensor:
    """The image's latent as first frame, then zeros: what an image-to-video model sees beside the noisy latent.

    With 1.5, ``frames`` is the padded number, and the image stands in the frame that is dropped in the end, as in both
    originals. Where it does not divide into patches, copies of the image go in front, as diffusers does.

    Args:
        image: ``(batch, channels, 1, height, width)``, scaled (:meth:`AutoencoderKLCogVideoX.normalize_image`).
        frames: of the latent that is sampled.
        patch_size_t: of the transformer.

    Returns:
        ``(batch, channels, frames, height, width)``, or more frames where copies were added.

    Raises:
        ValueError: ``image`` is not one latent frame, or ``frames`` is not positive.
    """
    if image.dim() != 5 or image.shape[2] != 1 or frames < 1:
        raise ValueError(
            "image_latents: image must be (batch, channels, 1, height, width) and frames at least 1, got "
            f"{tuple(image.shape)} and {frames}"
        )
    batch, channels, _, height, width = image.shape
    full = torch.cat([image, image.new_zeros(batch, channels, frames - 1, height, width)], 2)
    copies = 0 if patch_size_t is None else frames % patch_size_t
    return torch.cat([full[:, :, :copies], full], 2) if copies else full


def pad_training_latents(latents: Tensor, patch_size_t: int | None) -> Tensor:
    """Latents of a training clip with copies of the first frame in front until they divide into patches (1.5)."""
    missing = 0 if patch_size_t is None else -latents.shape[2] % patch_size_t
    return torch.cat([latents[:, :, :1]] * missing + [latents], 2) if missing else latents


def noise_image(image: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """``image + sigma * noise`` on the pixels of a condition while training, ``sigma = exp(N(-3, 0.5^2))`` per sample.

    Args:
        image: ``(batch, ...)``.
        generator: CPU generator of the draws.
    """
    sigma = (torch.randn(image.shape[0], generator=generator) * 0.5 - 3).exp()
    noise = torch.randn(image.shape, generator=generator)
    noise = noise * sigma.view(-1, *[1] * (image.dim() - 1))
    return image + noise.to(image)
