# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism cuts Open-Sora Plan v1.5."""

from __future__ import annotations

from vidgen.nn import COLUMN, GATHERED, ROW, Cut, TensorPlan

from .config import SparseUMMDiTConfig

# What joins a stage with its mirror image works on each rank's own tokens.
CUTS: dict[str, Cut] = {
    "transformer_blocks.*.norm[12].linear": GATHERED,
    "transformer_blocks.*.attn1.to_[qkv]": COLUMN,
    "transformer_blocks.*.attn1.add_[qkv]_proj": COLUMN,
    "transformer_blocks.*.attn1.to_out.0": ROW,
    "transformer_blocks.*.attn1.to_add_out": ROW,
    "transformer_blocks.*.ff.net.0.proj": COLUMN,
    "transformer_blocks.*.ff.net.2": ROW,
    "transformer_blocks.*.ff_enc.net.0.proj": COLUMN,
    "transformer_blocks.*.ff_enc.net.2": ROW,
    "norm_out.linear": GATHERED,
}


def tensor_plan(config: SparseUMMDiTConfig) -> TensorPlan:
    return TensorPlan(config.num_heads, CUTS)
