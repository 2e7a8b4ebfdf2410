# SPDX-License-Identifier: Apache-2.0
"""What MindSpeed-MM calls the tensors of Open-Sora Plan v1.3, and how it cuts them over ranks and stages."""

from __future__ import annotations

from vidgen.checkpoints.layout import Layout, Row, linear, tensor

OURS, THEIRS = "transformer_blocks.#", "videodit_sparse_blocks.#"


def _attention(ours: str, theirs: str) -> list[Row]:
    rows: list[Row] = []
    for name in "qkv":
        rows += linear(f"{ours}.to_{name}", f"{theirs}.proj_{name}", "d d", "column", bias="attention_bias")
    return rows + linear(f"{ours}.to_out.0", f"{theirs}.proj_out", "d d", "row")


def _same(name: str, shape: str, group: str = "", bias: str | None = "") -> list[Row]:
    return linear(name, name, shape, group=group, bias=bias)


_ROWS = [
    *_same("pos_embed.proj", "d c p p"),
    *_same("caption_projection.linear_1", "d t"),
    *_same("caption_projection.linear_2", "d d"),
    *_same("adaln_single.emb.timestep_embedder.linear_1", "d f"),
    *_same("adaln_single.emb.timestep_embedder.linear_2", "d d"),
    *_same("adaln_single.linear", "6d d"),
    *_same("pos_embed_masked_hidden_states.0.proj", "d c p p", "inpaint"),
    *_same("pos_embed_masked_hidden_states.1", "d d", "inpaint", bias=None),
    *_same("pos_embed_mask.0.proj", "d m p p", "inpaint"),
    *_same("pos_embed_mask.1", "d d", "inpaint", bias=None),
    tensor(f"{OURS}.scale_shift_table", f"{THEIRS}.scale_shift_table", "6 d"),
    *_attention(f"{OURS}.attn1", f"{THEIRS}.self_atten"),
    *_attention(f"{OURS}.attn2", f"{THEIRS}.cross_atten"),
    *linear(f"{OURS}.ff.net.0.proj", f"{THEIRS}.ff.net.0.proj", "4d d", "column"),
    *linear(f"{OURS}.ff.net.2", f"{THEIRS}.ff.net.2", "d 4d", "row"),
    tensor("scale_shift_table", "scale_shift_table", "2 d"),
    *_same("proj_out", "o d"),
]

MINDSPEED_MM = Layout(
    model="Open-Sora Plan v1.3",
    rows=tuple(_ROWS),
    first=("pos_embed", "caption_projection.", "adaln_single."),
    last=("scale_shift_table", "proj_out."),
    blocks="videodit_sparse_blocks.",
    virtual_stages=True,
)
