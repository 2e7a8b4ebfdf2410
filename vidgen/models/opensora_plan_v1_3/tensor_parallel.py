# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism cuts Open-Sora Plan v1.3."""

from __future__ import annotations

from vidgen.nn import COLUMN, GATHERED, ROW, Cut, TensorPlan

from .config import OpenSoraConfig

CUTS: dict[str, Cut] = {
    "adaln_single.linear": GATHERED,
    "transformer_blocks.*.attn?.to_[qkv]": COLUMN,
    "transformer_blocks.*.attn?.to_out.0": ROW,
    "transformer_blocks.*.ff.net.0.proj": COLUMN,
    "transformer_blocks.*.ff.net.2": ROW,
}


def tensor_plan(config: OpenSoraConfig) -> TensorPlan:
    return TensorPlan(config.num_attention_heads, CUTS)
