# SPDX-License-Identifier: Apache-2.0
"""What MindSpeed-MM calls the tensors of Open-Sora 2.0. It cuts them over neither ranks nor stages.

Fused projections and the guidance embedding have no other names there, as its own converter leaves them.
"""

from __future__ import annotations

from vidgen.checkpoints.layout import Layout, Row, linear, tensor

from .config import MMDiTConfig


def _same(name: str, shape: str, group: str = "") -> list[Row]:
    return linear(name, name, shape, group=group)


def _double(stream: str) -> list[Row]:
    block = f"double_blocks.#.{stream}"
    rows = [
        *linear(f"{block}_mod.lin", f"{block}_mod.linear", "6d d"),
        *linear(f"{block}_attn.qkv", f"{block}_attn.qkv", "3d d", group="fused", bias="fused_bias"),
        tensor(f"{block}_attn.norm.query_norm.scale", f"{block}_attn.q_norm.weight", "h"),
        tensor(f"{block}_attn.norm.key_norm.scale", f"{block}_attn.k_norm.weight", "h"),
        *linear(f"{block}_attn.proj", f"{block}_attn.proj_out", "d d"),
        *linear(f"{block}_mlp.0", f"{block}_mlp.fc1", "m d"),
        *linear(f"{block}_mlp.2", f"{block}_mlp.fc2", "d m"),
    ]
    for name in "qkv":
        ours, theirs = f"{block}_attn.{name}_proj", f"{block}_attn.proj_{name}"
        rows += linear(ours, theirs, "d d", group="separate", bias="separate_bias")
    return rows


def _single() -> list[Row]:
    block = "single_blocks.#"
    return [
        *_same(f"{block}.linear1", "3d+m d", "fused"),
        *_same(f"{block}.q_proj", "d d", "separate"),
        *_same(f"{block}.k_proj", "d d", "separate"),
        *_same(f"{block}.v_mlp", "d+m d", "separate"),
        *_same(f"{block}.linear2", "d d+m"),
        tensor(f"{block}.norm.query_norm.scale", f"{block}.q_norm.weight", "h"),
        tensor(f"{block}.norm.key_norm.scale", f"{block}.k_norm.weight", "h"),
        *linear(f"{block}.modulation.lin", f"{block}.modulation.linear", "3d d"),
    ]


_ROWS = [
    *_same("img_in", "d c"),
    *linear("time_in.in_layer", "time_in.mlp.0", "d f"),
    *linear("time_in.out_layer", "time_in.mlp.2", "d d"),
    *linear("vector_in.in_layer", "vector_in.fc1", "d v"),
    *linear("vector_in.out_layer", "vector_in.fc2", "d d"),
    *_same("guidance_in.in_layer", "d f", "guidance"),
    *_same("guidance_in.out_layer", "d d", "guidance"),
    *_same("cond_in", "d x", "cond"),
    *_same("txt_in", "d t"),
    *_double("img"),
    *_double("txt"),
    *_single(),
    *_same("final_layer.linear", "c d"),
    *_same("final_layer.adaLN_modulation.1", "2d d"),
]


def _refusal(config: MMDiTConfig) -> str | None:
    if config.fused_qkv or not config.use_liger_rope:
        return (
            "MindSpeed-MM has separate projections and rotates the halves of a head (fused_qkv False, use_liger_rope "
            f"True), got {config.fused_qkv} and {config.use_liger_rope}; convert with to_release_layout first"
        )
    return None


MINDSPEED_MM = Layout(
    model="Open-Sora 2.0",
    rows=tuple(_ROWS),
    tensor_parallel=False,
    alternatives=(("separate", "fused"),),
    refusal=_refusal,
)
