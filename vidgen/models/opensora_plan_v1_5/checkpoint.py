# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of Open-Sora Plan v1.5 call its tensors.

Our names are the original's. Merged files of the original are flat maps of names to tensors, or hold one under
``model`` or ``state_dict``; MindSpeed-MM's fork renames the attention's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import SparseUMMDiTConfig

# Where a file that is not a flat map keeps the weights.
WRAPPERS = ("model", "state_dict")

# MindSpeed-MM's name of a layer inside ``attn1``, and ours.
MINDSPEED_MM_LAYERS = {
    "proj_q": "to_q",
    "proj_k": "to_k",
    "proj_v": "to_v",
    "proj_out": "to_out.0",
    "added_proj_q": "add_q_proj",
    "added_proj_k": "add_k_proj",
    "added_proj_v": "add_v_proj",
    "added_proj_out": "to_add_out",
    "norm_proj_q": "norm_q",
    "norm_proj_k": "norm_k",
    "norm_added_proj_q": "norm_added_q",
    "norm_added_proj_k": "norm_added_k",
}

# Tensors of the last block that exist in checkpoints trained with tensor parallelism: computed there and thrown away.
INERT_LAST_BLOCK = (
    "attn1.to_add_out.weight",
    "attn1.to_add_out.bias",
    "norm2.norm_enc.weight",
    "norm2.norm_enc.bias",
    "ff_enc.net.0.proj.weight",
    "ff_enc.net.2.weight",
)


def ignored_keys(config: SparseUMMDiTConfig) -> tuple[str, ...]:
    """Patterns of names that a checkpoint may hold and the model has no use for."""
    stage, block = len(config.num_layers) - 1, config.num_layers[-1] - 1
    return "*._extra_state", *(f"transformer_blocks.{stage}.{block}.{name}" for name in INERT_LAST_BLOCK)


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Any of the forms above as a flat map in our names."""
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    return {rename(str(key)): value for key, value in state.items()}


def rename(key: str) -> str:
    """MindSpeed-MM's name of a tensor as ours; our own names stay."""
    head, attention, layer = key.partition(".attn1.")
    name, _, leaf = layer.rpartition(".")
    return f"{head}{attention}{MINDSPEED_MM_LAYERS[name]}.{leaf}" if name in MINDSPEED_MM_LAYERS else key
