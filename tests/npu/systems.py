# SPDX-License-Identifier: Apache-2.0
"""The four systems with inputs for a video of any size, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.models import autoencoders, cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2
from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config
from vidgen.nn import pack_patches, patch_positions

Size = tuple[int, int, int]  # frames, height, width of the video
Draw = Callable[..., Tensor]


def drawer(device: torch.device, dtype: torch.dtype) -> Draw:
    """Random numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def build_transformer(system: str, preset: str) -> nn.Module:
    if system == "cogvideox":
        return cogvideox.CogVideoXTransformer3DModel(cogvideox.preset(preset))
    if system == "opensora_v2":
        return opensora_v2.MMDiT(opensora_v2.preset(preset))
    if system == "opensora_plan_v1_5":
        return opensora_plan_v1_5.SparseUMMDiT(opensora_plan_v1_5.preset(preset))
    config = opensora_plan_v1_3.preset(preset)
    inpaint = isinstance(config, opensora_plan_v1_3.OpenSoraInpaintConfig)
    cls = opensora_plan_v1_3.OpenSoraInpaint_v1_3 if inpaint else opensora_plan_v1_3.OpenSoraT2V_v1_3
    return cls(config)


def build_vae(system: str, preset: str) -> nn.Module:
    """``preset``: "released", "small" or "tiny"."""
    if system == "cogvideox":
        name = {"released": "5b"}.get(preset, preset)
        return autoencoders.AutoencoderKLCogVideoX(cogvideox_vae_config.preset(name))
    if system == "opensora_v2":
        return autoencoders.HunyuanVAE(hunyuan_vae_config.preset(preset))
    return autoencoders.WFVAE(autoencoders.preset(preset if system == "opensora_plan_v1_5" else f"{preset}_4x8x8"))


def latent_size(system: str, video: Size) -> Size:
    frames_per_latent = 8 if system == "opensora_plan_v1_5" else 4
    return (video[0] - 1) // frames_per_latent + 1, video[1] // 8, video[2] // 8


def transformer_inputs(
    system: str, config: Any, video: Size, draw: Draw, batch: int = 1, tokens: int | None = None
) -> dict[str, Tensor]:
    """Arguments of ``forward``; captions have ``tokens`` tokens, of which the last quarter is padding."""
    latent, device = latent_size(system, video), draw(1).device
    if system == "cogvideox":
        pairs = config.patch_size_t or 1  # pipelines lengthen the latent to whole patches
        return {
            "hidden_states": draw(batch, config.in_channels, -(-latent[0] // pairs) * pairs, *latent[1:]),
            "timestep": torch.linspace(20, 980, batch, device=device).long(),
            "encoder_hidden_states": draw(batch, config.max_text_seq_length, config.text_embed_dim),
        }
    tokens = tokens or 512
    if system == "opensora_v2":
        patch = config.patch_size
        grid = (latent[0], latent[1] // patch, latent[2] // patch)
        inputs = {
            "img": pack_patches(draw(batch, config.in_channels // patch**2, *latent), patch),
            "img_ids": patch_positions(grid, device=device),
            "txt": draw(batch, tokens, config.context_in_dim),
            "txt_ids": torch.zeros(tokens, 3, device=device),
            "timesteps": torch.linspace(0.2, 0.9, batch, device=device),
            "y_vec": draw(batch, config.vec_in_dim),
        }
        if config.cond_embed:
            inputs["cond"] = draw(batch, grid[0] * grid[1] * grid[2], config.cond_channels)
        return inputs
    channels = config.in_channels if system == "opensora_plan_v1_5" else config.input_channels
    inputs = {
        "hidden_states": draw(batch, channels, *latent),
        "timestep": torch.linspace(100, 900, batch, device=device),
        "encoder_hidden_states": draw(batch, tokens, config.caption_channels),
        "encoder_attention_mask": (torch.arange(tokens) < tokens - tokens // 4).expand(batch, tokens).to(device),
    }
    if system == "opensora_plan_v1_5":
        inputs["pooled_projections"] = draw(batch, config.pooled_projection_dim)
    return inputs


def wake(model: nn.Module) -> None:
    """Give weights that begin at zero, such as modulations, something to say."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)
