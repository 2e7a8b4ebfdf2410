# SPDX-License-Identifier: Apache-2.0
"""What training systems call the tensors of Open-Sora Plan v1.5, and how they cut them over tensor-parallel ranks.

The original trains under our names; MindSpeed-MM's fork renames the attention's layers. Neither cuts the model into
pipeline stages. With more than one rank both keep text outputs in the last block, which are computed and thrown away.
"""

from __future__ import annotations

from vidgen.checkpoints.layout import Layout, Row, Split, linear, renamed, tensor

from .checkpoint import MINDSPEED_MM_LAYERS

BLOCK = "transformer_blocks.#.#"
THEIRS = {ours: theirs for theirs, ours in MINDSPEED_MM_LAYERS.items()}


def _same(name: str, shape: str, split: Split = "replicated", group: str = "", not_in_last: bool = False) -> list[Row]:
    return linear(name, name, shape, split, group, not_in_last=not_in_last)


def _norm(name: str, group: str = "", not_in_last: bool = False) -> list[Row]:
    return linear(name, name, "d", bias="layer_norm" + group, group=group, not_in_last=not_in_last)


def _attention() -> list[Row]:
    rows: list[Row] = []
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        rows += linear(f"{BLOCK}.attn1.{name}", f"{BLOCK}.attn1.{name}", "d d", "column", bias="attention_bias")
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        rows += linear(f"{BLOCK}.attn1.{name}", f"{BLOCK}.attn1.{name}", "h", bias=None)
    rows += _same(f"{BLOCK}.attn1.to_out.0", "d d", "row")
    return rows + _same(f"{BLOCK}.attn1.to_add_out", "d d", "row", not_in_last=True)


def _feed_forward(name: str, group: str = "", **options: bool) -> list[Row]:
    up, down = f"{BLOCK}.{name}.net.0.proj.weight", f"{BLOCK}.{name}.net.2.weight"
    return [tensor(up, up, "4d d", "column", group, **options), tensor(down, down, "d 4d", "row", group, **options)]


_ROWS = [
    *_same("patch_embed.proj", "d c p p"),
    *_same("time_text_embed.timestep_embedder.linear_1", "e e"),
    *_same("time_text_embed.timestep_embedder.linear_2", "e e"),
    *_same("time_text_embed.text_embedder.linear_1", "e t"),
    *_same("time_text_embed.text_embedder.linear_2", "e e"),
    *_same("caption_projection", "d k"),
    *_same(f"{BLOCK}.norm1.linear", "6d e", "column"),
    *_norm(f"{BLOCK}.norm1.norm"),
    *_norm(f"{BLOCK}.norm1.norm_enc"),
    *_attention(),
    *_same(f"{BLOCK}.norm2.linear", "6d e", "column"),
    *_norm(f"{BLOCK}.norm2.norm"),
    *_norm(f"{BLOCK}.norm2.norm_enc", "double_ff", not_in_last=True),
    *_feed_forward("ff"),
    *_feed_forward("ff_enc", "double_ff", not_in_last=True),
    *_same("skip_norm_linear.#.0", "2d", group="skip_norm"),
    *_same("skip_norm_linear_enc.#.0", "2d", group="skip_norm"),
    *_same("skip_norm_linear.#.1", "d 2d", group="skip"),
    *_same("skip_norm_linear_enc.#.1", "d 2d", group="skip"),
    *_norm("norm_final"),
    *_same("norm_out.linear", "2d e", "column"),
    *_norm("norm_out.norm"),
    *_same("proj_out", "o d"),
]


def _name(row: Row) -> str:
    head, attention, layer = row.theirs.partition(".attn1.")
    stem, _, leaf = layer.rpartition(".")
    return f"{head}{attention}{THEIRS[stem]}.{leaf}" if attention else row.theirs


ORIGINAL = Layout(model="Open-Sora Plan v1.5", rows=tuple(_ROWS))
MINDSPEED_MM = renamed(ORIGINAL, _name)
