# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Open-Sora 2.0 and Flux: our names are theirs; here is what turns one layout into another.

The release has separate projections and rotates the halves of a head. Flux has fused projections and rotates
neighbouring channels. Neither difference changes what a model computes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import MMDiTConfig

# Where a file that is not a flat map keeps the weights.
WRAPPERS = ("model", "state_dict", "module")

FUSED_DOUBLE = re.compile(r"(double_blocks\.\d+\.(?:img|txt)_attn)\.qkv\.(weight|bias)")
FUSED_SINGLE = re.compile(r"(single_blocks\.\d+)\.linear1\.(weight|bias)")
ROTATED = re.compile(
    r"double_blocks\.\d+\.(?:img|txt)_attn\.(?:[qk]_proj\.(?:weight|bias)|norm\.(?:query|key)_norm\.scale)"
    r"|single_blocks\.\d+\.(?:[qk]_proj\.(?:weight|bias)|norm\.(?:query|key)_norm\.scale)"
)


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A flat map of our names, from one or from a file that holds one under a wrapper's name."""
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    return dict(state)


def to_release_layout(state: Mapping[str, Tensor], config: MMDiTConfig) -> tuple[dict[str, Tensor], MMDiTConfig]:
    """The same model with separate projections and half-split rotation, as Open-Sora 2.0 fine-tuned it from Flux.

    Args:
        state: weights of a model with ``config``, in any layout.
        config: their configuration.

    Returns:
        New weights and their configuration; ``fused_qkv`` is False and ``use_liger_rope`` True. Outputs are equal up
        to rounding.
    """
    result = dict(state)
    if config.fused_qkv:
        result = split_projections(result, config.hidden_size)
    if not config.use_liger_rope:
        result = {
            key: pairs_to_halves(t, config.head_dim) if ROTATED.fullmatch(key) else t for key, t in result.items()
        }
    return result, dataclasses.replace(config, fused_qkv=False, use_liger_rope=True)


def split_projections(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """``qkv`` to ``q_proj``, ``k_proj``, ``v_proj`` and ``linear1`` to ``q_proj``, ``k_proj``, ``v_mlp``."""
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := FUSED_DOUBLE.fullmatch(key):
            names = ("q_proj", "k_proj", "v_proj")
            parts = tensor.split(width)
        elif match := FUSED_SINGLE.fullmatch(key):
            names = ("q_proj", "k_proj", "v_mlp")
            parts = tensor.split((width, width, tensor.shape[0] - 2 * width))
        else:
            result[key] = tensor
            continue
        result.update({f"{match[1]}.{name}.{match[2]}": part.clone() for name, part in zip(names, parts, strict=True)})
    return result


def pairs_to_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Within each head along the first axis, channels 2 j and 2 j + 1 go to j and j + head_dim / 2."""
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2))).to(tensor.device)
    return tensor.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
