# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of the CogVideoX VAE hold: SAT's ``3d-vae.pt`` in our names, which are diffusers'.

SAT counts the levels of both halves from the pixels; diffusers those of the decoder from the latent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# SAT's part of a name and ours, apart from the levels of the decoder.
PARTS = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
BACK = (
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.", r"decoder.up.\1.block."),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A file of SAT or of diffusers as a flat map in our names. SAT's loss, with its discriminator, is left out."""
    inner = state.get("state_dict")
    state = inner if isinstance(inner, Mapping) else state
    kept = {str(key): value for key, value in state.items() if not str(key).startswith("loss")}
    return renamed(kept, PARTS, "up") if any(key.startswith("decoder.up.") for key in kept) else kept


def to_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our flat map in SAT's names, as they stand under ``state_dict`` in its file."""
    return renamed(state, BACK, "up_blocks")


def renamed(state: Mapping[str, Any], parts: tuple[tuple[str, str], ...], levels: str) -> dict[str, Any]:
    level = re.compile(rf"^decoder\.{levels}\.(\d+)\.")
    found = [int(match[1]) for key in state if (match := level.match(key))]
    last = max(found, default=0)
    result = {}
    for key, value in state.items():
        key = level.sub(lambda match: f"decoder.{levels}.{last - int(match[1])}.", key)
        for pattern, replacement in parts:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result
