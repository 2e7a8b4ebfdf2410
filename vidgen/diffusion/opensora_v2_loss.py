# SPDX-License-Identifier: Apache-2.0
"""Training side of Open-Sora 2.0: what the model is given, and the loss of what it answers.

Source: hpcaitech/Open-Sora, commit 7ad6a96. Shapes: B batch, C channels, T H W latent frames, height and width,
L tokens of a packed latent, S text tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.nn import pack_patches, patch_positions

from .flow_matching import logit_normal_sigmas
from .opensora_v2 import resolution_shift
from .schedules import shift_sigmas

SIGMA_MIN = 1e-5
TEXT_DROPOUT = 0.31622777  # of each text encoder, so that both are dropped in a tenth of the samples


def training_levels(normal: Tensor, latent_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """``a s / (1 + (a - 1) s)`` with ``s = sigmoid(normal)``: standard normal draws ``(B)`` to noise levels.

    ``a`` is ``resolution_shift(H W // 4, T)``, with H W // 4 whatever the patch size.
    """
    frames, height, width = latent_shape[-3:]
    return shift_sigmas(logit_normal_sigmas(normal), resolution_shift(max(height * width // 4, 1), frames))


def mix_with_noise(clean: Tensor, noise: Tensor, levels: Tensor, *, sigma_min: float = SIGMA_MIN) -> Tensor:
    """``r x + (1 - (1 - sigma_min) r) noise`` with ``r = 1 - level``, computed in float32, in the dtype of ``clean``.

    Args:
        clean, noise: ``(B, ...)`` of one shape.
        levels: ``(B)``.
    """
    wide = torch.promote_types(clean.dtype, torch.float32)
    rest = (1 - levels.to(wide)).view(-1, *([1] * (clean.dim() - 1)))
    return (rest * clean.to(wide) + (1 - (1 - sigma_min) * rest) * noise.to(wide)).to(clean.dtype)


def velocity_target(clean: Tensor, noise: Tensor, *, sigma_min: float = SIGMA_MIN) -> Tensor:
    """``(1 - sigma_min) noise - x``, the derivative of :func:`mix_with_noise` by the level, in float32 at least."""
    wide = torch.promote_types(clean.dtype, torch.float32)
    return (1 - sigma_min) * noise.to(wide) - clean.to(wide)


def drop_text(text: Tensor, null: Tensor, uniform: Tensor, ratio: float = TEXT_DROPOUT) -> Tensor:
    """Samples of ``text`` with ``uniform < ratio`` replaced by the embedding of the empty caption.

    Args:
        text: ``(B, S, channels)`` tokens or ``(B, channels)`` pooled.
        null: the empty caption's, batch 1; where it has fewer tokens its last one is repeated.
        uniform: ``(B)`` draws from [0, 1).
        ratio: how often.

    Raises:
        ValueError: shapes do not fit or ``ratio`` is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"drop_text: ratio must lie in [0, 1], got {ratio}")
    if text.dim() == 3 and 0 < null.shape[1] < text.shape[1]:
        null = torch.cat((null, null[:, -1:].expand(-1, text.shape[1] - null.shape[1], -1)), 1)
    if null.shape != (1, *text.shape[1:]) or uniform.shape != text.shape[:1]:
        wanted = f"{(1, *text.shape[1:])} and {tuple(text.shape[:1])}"
        raise ValueError(
            f"drop_text: null and uniform must be {wanted}, got {tuple(null.shape)}, {tuple(uniform.shape)}"
        )
    dropped = (uniform < ratio).view(-1, *([1] * (text.dim() - 1)))
    return torch.where(dropped.to(text.device), null.to(text), text)


def training_inputs(
    latent: Tensor,
    txt: Tensor,
    y_vec: Tensor,
    *,
    normal: Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
    masked_latent: Tensor | None = None,
    patch_size: int = 2,
    guidance: float = 4.0,
    sigma_min: float = SIGMA_MIN,
) -> tuple[dict[str, Tensor], Tensor]:
    """The keyword arguments of ``MMDiT`` for a training step, and what it should answer.

    Args:
        latent: scaled ``(B, C, T, H, W)``; everything has its dtype.
        txt, y_vec: ``(B, S, text channels)`` and ``(B, pooled channels)``, after dropout.
        normal: ``(B)`` standard normal float32 draws, see :func:`training_levels`.
        noise: standard normal of the latent's shape, or packed ``(B, L, C p p)`` as the original draws it; float32.
        mask, masked_latent: from ``training_condition``; None for a model without ``cond_embed``.
        patch_size: p of the model.
        guidance: what guidance-distilled models are told.
        sigma_min: noise left at level 0.

    Returns:
        ``(arguments, target)``; target ``(B, L, C p p)``.

    Raises:
        ValueError: shapes do not fit.
    """
    clean = pack_patches(latent, patch_size)
    noise = pack_patches(noise, patch_size) if noise.dim() == 5 else noise
    if noise.shape != clean.shape or tuple(normal.shape) != (len(latent),):
        raise ValueError(
            f"training_inputs: noise and normal must be {tuple(clean.shape)} (packed) and {(len(latent),)}, got "
            f"{tuple(noise.shape)} and {tuple(normal.shape)}"
        )
    if (mask is None) != (masked_latent is None):
        raise ValueError("training_inputs: mask and masked_latent go together, got only one of them")
    noise = noise.to(clean)
    levels = training_levels(normal.to(latent.device), latent.shape).to(latent.dtype)
    grid = (latent.shape[2], latent.shape[3] // patch_size, latent.shape[4] // patch_size)
    ids = patch_positions(grid, device=latent.device)
    arguments = {
        "img": mix_with_noise(clean, noise, levels, sigma_min=sigma_min),
        "img_ids": ids,
        "txt": txt.to(latent.dtype),
        "txt_ids": ids.new_zeros(txt.shape[1], 3),
        "timesteps": levels,
        "y_vec": y_vec.to(latent.dtype),
        "guidance": torch.full_like(levels, guidance),
    }
    if mask is not None and masked_latent is not None:
        arguments["cond"] = pack_patches(torch.cat((mask, mask * masked_latent), 1).to(latent.dtype), patch_size)
    return arguments, velocity_target(clean, noise, sigma_min=sigma_min)


def batch_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error in float32; with a mask, of the frames that were not given, averaged over the samples.

    Args:
        prediction, target: ``(B, L, channels)``, tokens frame by frame.
        mask: ``(B, T)``, ``(B, T, H, W)`` or ``(B, 1, T, H, W)``, 1 in given frames. Of a sample in which no frame
            between the first and the last is given, the first and the last are left out where they are given; samples
            with longer given parts count as a whole.

    Raises:
        ValueError: shapes do not fit, or a sample has no frame left.
    """
    if prediction.shape != target.shape or prediction.dim() != 3:
        raise ValueError(
            f"batch_loss: prediction and target must be (batch, tokens, channels) alike, got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    wide = torch.promote_types(prediction.dtype, torch.float32)
    if mask is None:
        return F.mse_loss(prediction.to(wide), target.to(wide))
    mask = mask[:, 0] if mask.dim() == 5 else mask
    given = (mask.flatten(2)[:, :, 0] if mask.dim() > 2 else mask) == 1
    if len(given) != len(prediction) or prediction.shape[1] % given.shape[1]:
        raise ValueError(
            f"batch_loss: mask must be for {len(prediction)} samples and divide {prediction.shape[1]} tokens into "
            f"frames, got {tuple(mask.shape)}"
        )
    error = (prediction.to(wide) - target.to(wide)).square().unflatten(1, (given.shape[1], -1)).mean((2, 3))
    counted = torch.ones_like(given)
    ends_only = ~given[:, 1:-1].any(1)
    counted[:, 0] &= ~(given[:, 0] & ends_only)
    counted[:, -1] &= ~(given[:, -1] & ends_only)
    if not counted.any(1).all():
        raise ValueError("batch_loss: every frame of a sample is given, nothing is left to learn from")
    return ((error * counted).sum(1) / counted.sum(1)).mean()
