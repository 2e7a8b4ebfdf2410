# SPDX-License-Identifier: Apache-2.0
"""A small transformer of every system with random weights everywhere, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidgen.models import cogvideox, opensora_plan_v1_3, opensora_plan_v1_5, opensora_v2
from vidgen.models.opensora_plan_v1_3.model import OpenSoraInpaint_v1_3, OpenSoraT2V_v1_3
from vidgen.nn import patch_positions

SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")


def make_model(system: str, preset: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """The tiny preset of a system; no weight is zero, so that a gradient that is lost is seen."""
    name = preset or ("tiny-1.5" if system == "cogvideox" else "tiny")
    if system == "opensora_plan_v1_3":
        config = opensora_plan_v1_3.preset(name, **changes)
        model: Any = (OpenSoraInpaint_v1_3 if name.endswith("i2v") else OpenSoraT2V_v1_3)(config)
    elif system == "opensora_plan_v1_5":
        model = opensora_plan_v1_5.SparseUMMDiT(opensora_plan_v1_5.preset(name, **changes))
    elif system == "opensora_v2":
        model = opensora_v2.MMDiT(opensora_v2.preset(name, **changes))
    else:
        model = cogvideox.CogVideoXTransformer3DModel(cogvideox.preset(name, **changes))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = p.dim() == 1 and name.endswith(("weight", "scale"))
            p.copy_(torch.randn(p.shape, generator=random) * (0.1 if p.dim() > 1 else 0.3) + is_norm)
    return model


def make_inputs(
    model: Any,
    latent: tuple[int, int, int] = (3, 6, 10),
    batch: int = 2,
    text: int = 7,
    seed: int = 1,
    *,
    masks: bool = True,
) -> dict[str, Tensor]:
    """Keyword arguments of a model's forward; ``latent`` is its frames, height and width. A part of the text and of
    the video is hidden where the model takes masks."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    config, kind = model.config, type(model.config).__name__
    if kind == "MMDiTConfig":
        grid = (latent[0], latent[1] // config.patch_size, latent[2] // config.patch_size)
        count = grid[0] * grid[1] * grid[2]
        inputs = {
            "img": normal(batch, count, config.in_channels),
            "img_ids": patch_positions(grid),
            "txt": normal(batch, text, config.context_in_dim),
            "txt_ids": torch.zeros(text, 3),
            "timesteps": torch.linspace(0.3, 0.8, batch),
            "y_vec": normal(batch, config.vec_in_dim),
        }
        if config.cond_embed:
            inputs["cond"] = normal(batch, count, config.cond_channels)
        if config.guidance_embed:
            inputs["guidance"] = torch.full((batch,), 4.0)
        return inputs
    timestep = torch.linspace(100, 800, batch)
    if kind.startswith("CogVideoX"):
        frames = -(-latent[0] // config.patch[0]) * config.patch[0]
        added = config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings
        text = config.max_text_seq_length if added else text
        return {
            "hidden_states": normal(batch, config.in_channels, frames, *latent[1:]),
            "timestep": timestep,
            "encoder_hidden_states": normal(batch, text, config.text_embed_dim),
        }
    channels = getattr(config, "input_channels", config.in_channels)
    inputs = {
        "hidden_states": normal(batch, channels, *latent),
        "timestep": timestep,
        "encoder_hidden_states": normal(batch, text, config.caption_channels),
    }
    if kind == "SparseUMMDiTConfig":
        inputs["pooled_projections"] = normal(batch, config.pooled_projection_dim)
    if masks:
        inputs["attention_mask"] = torch.ones(batch, *latent)
        inputs["attention_mask"][-1, -1:] = 0
        inputs["encoder_attention_mask"] = torch.ones(batch, text)
        inputs["encoder_attention_mask"][-1, text // 2 :] = 0
    return inputs
