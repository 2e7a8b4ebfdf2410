# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of Open-Sora Plan v1.3 call their tensors.

Our names are the original's, which are those of its sharded safetensors. Single files may hold a flat map of names to
tensors, or one under ``model`` or ``state_dict``; MindSpeed-MM renames the blocks and their attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where a file that is not a flat map keeps the weights.
WRAPPERS = ("model", "state_dict")

# MindSpeed-MM's names of parts, and ours, anywhere between the dots of a block's tensor.
MINDSPEED_MM_BLOCKS = "videodit_sparse_blocks"
MINDSPEED_MM_PARTS = {
    "self_atten": "attn1",
    "cross_atten": "attn2",
    "proj_q": "to_q",
    "proj_k": "to_k",
    "proj_v": "to_v",
    "proj_out": "to_out.0",
}

# Text-to-video weights that the original's inpainting model starts from lack these.
INPAINT_MODULES = ("pos_embed_masked_hidden_states", "pos_embed_mask")


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """Any of the forms above as a flat map in our names."""
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    return {rename(str(key)): value for key, value in state.items()}


def rename(key: str) -> str:
    """MindSpeed-MM's name of a tensor as ours; our own names stay."""
    blocks, dot, rest = key.partition(".")
    if blocks != MINDSPEED_MM_BLOCKS:
        return key
    return f"transformer_blocks{dot}" + ".".join(MINDSPEED_MM_PARTS.get(part, part) for part in rest.split("."))
