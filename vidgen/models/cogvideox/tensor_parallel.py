# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism cuts CogVideoX."""

from __future__ import annotations

from vidgen.nn import COLUMN, GATHERED, ROW, Cut, TensorPlan

from .config import CogVideoXConfig

CUTS: dict[str, Cut] = {
    "transformer_blocks.*.norm[12].linear": GATHERED,
    "transformer_blocks.*.attn1.to_[qkv]": COLUMN,
    "transformer_blocks.*.attn1.to_out.0": ROW,
    "transformer_blocks.*.ff.net.0.proj": COLUMN,
    "transformer_blocks.*.ff.net.2": ROW,
    "norm_out.linear": GATHERED,
}


def tensor_plan(config: CogVideoXConfig) -> TensorPlan:
    return TensorPlan(config.num_attention_heads, CUTS)
