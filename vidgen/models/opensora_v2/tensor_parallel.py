# SPDX-License-Identifier: Apache-2.0
"""How tensor parallelism cuts Open-Sora 2.0."""

from __future__ import annotations

from vidgen.nn import COLUMN, GATHERED, ROW, Cut, TensorPlan

from .config import MMDiTConfig


def tensor_plan(config: MMDiTConfig) -> TensorPlan:
    width, inner = config.hidden_size, config.mlp_hidden_size
    cuts = {
        "double_blocks.*.*_mod.lin": GATHERED,
        "double_blocks.*.*_attn.qkv": Cut("column", (width, width, width)),
        "double_blocks.*.*_attn.[qkv]_proj": COLUMN,
        "double_blocks.*.*_attn.proj": ROW,
        "double_blocks.*.*_mlp.0": COLUMN,
        "double_blocks.*.*_mlp.2": ROW,
        "single_blocks.*.modulation.lin": GATHERED,
        "single_blocks.*.linear1": Cut("column", (width, width, width, inner)),
        "single_blocks.*.[qk]_proj": COLUMN,
        "single_blocks.*.v_mlp": Cut("column", (width, inner)),
        "single_blocks.*.linear2": Cut("row", (width, inner)),
        "final_layer.adaLN_modulation.1": GATHERED,
    }
    return TensorPlan(config.num_heads, cuts)
