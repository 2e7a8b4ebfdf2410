# SPDX-License-Identifier: Apache-2.0
"""What MindSpeed-MM and SAT call the tensors of CogVideoX, and how MindSpeed-MM cuts them over ranks and stages.

Our names are those of diffusers. Both others fuse queries, keys and values, and keep one modulation of twelve parts per
block where we have two of six. Position tables are kept where they are learned; what can be computed is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vidgen.checkpoints.layout import Layout, Part, Row, Split, linear, renamed, tensor
from vidgen.checkpoints.lazy import State

from .checkpoint import BLOCK_MODULES, BLOCK_PARTS, MODULES, NOT_WEIGHTS, PREFIX, TABLE

OURS, THEIRS = "transformer_blocks.#", "videodit_blocks.#"
SAT_QKV, SAT_MODULATION = BLOCK_PARTS


def _fused(sat: str, theirs: str, width: str, split: Split, bias: str = "") -> list[Row]:
    """MindSpeed-MM fuses the tensors that SAT fuses, in SAT's order; what they have in common is written there."""
    count, targets = BLOCK_PARTS[sat]
    rows = []
    for leaf, inner, group in (("weight", f" {width}", ""), ("bias", "", bias)):
        sizes = {name: f"{len(chunks)}d{inner}" for name, chunks in targets.items()}
        parts = tuple(Part(f"{OURS}.{name}.{leaf}", sizes[name], chunks) for name, chunks in targets.items())
        rows.append(Row(f"{THEIRS}.{theirs}.{leaf}", f"{count}d{inner}", parts, split, group))
    return rows


_ROWS = [
    *linear("time_embedding.linear_1", "time_embed.time_embed.0", "e d"),
    *linear("time_embedding.linear_2", "time_embed.time_embed.2", "e e"),
    *linear("ofs_embedding.linear_1", "ofs_embed.0", "e e", group="ofs"),
    *linear("ofs_embedding.linear_2", "ofs_embed.2", "e e", group="ofs"),
    *linear("patch_embed.proj", "patch_embed.proj", "d c p p|d q", bias="patch_bias"),
    *linear("patch_embed.text_proj", "caption_projection", "d t"),
    tensor(TABLE[1], "pos_embed.pos_embedding", "1 n d", group="positions"),
    *_fused(SAT_MODULATION, "scale_shift_table.1", "e", "column"),
    *linear(f"{OURS}.norm1.norm", f"{THEIRS}.norm1", "d"),
    *_fused(SAT_QKV, "self_atten.proj_qkv", "d", "qkv", bias="attention_bias"),
    *linear(f"{OURS}.attn1.norm_q", f"{THEIRS}.self_atten.q_norm", "h"),
    *linear(f"{OURS}.attn1.norm_k", f"{THEIRS}.self_atten.k_norm", "h"),
    *linear(f"{OURS}.attn1.to_out.0", f"{THEIRS}.self_atten.proj_out", "d d", "row"),
    *linear(f"{OURS}.norm2.norm", f"{THEIRS}.norm2", "d"),
    *linear(f"{OURS}.ff.net.0.proj", f"{THEIRS}.ff.net.0.proj", "4d d", "column"),
    *linear(f"{OURS}.ff.net.2", f"{THEIRS}.ff.net.2", "d 4d", "row"),
    *linear("norm_final", "norm_final", "d"),
    *linear("norm_out.norm", "norm_out", "d"),
    *linear("norm_out.linear", "adaLN_modulation.1", "2d e", "column"),
    *linear("proj_out", "proj_out_linear", "o d"),
]


def _suspicion(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """MindSpeed-MM's own converter forgets the embedding of the frame offset when it cuts a model into stages."""
    patch = shapes.get("patch_embed.proj.weight", ())
    out = shapes.get("proj_out_linear.weight", shapes.get("proj_out.weight", (0, 0)))[0]
    has_others = any(name.startswith("ofs_embed") or name.endswith("pos_embedding") for name in shapes)
    # Twice as many channels in as out, and no learned positions as 1.0 has them: version 1.5, image to video.
    if len(patch) == 2 and patch[1] == 2 * out and not has_others:
        return (
            "ofs_embed.* is missing, which version 1.5 image-to-video models have: MindSpeed-MM's converter drops it "
            "when it cuts a model into stages; convert from the model that was cut"
        )
    return None


MINDSPEED_MM = Layout(
    model="CogVideoX transformer",
    rows=tuple(_ROWS),
    first=("time_embed.", "ofs_embed.", "patch_embed.", "caption_projection.", "pos_embed."),
    last=("norm_final.", "norm_out.", "proj_out_linear.", "adaLN_modulation."),
    blocks="videodit_blocks.",
    ignored=("pos_embed.freqs_sin", "pos_embed.freqs_cos"),
    suspicion=_suspicion,
)


def _sat_name(row: Row) -> str:
    ours = row.parts[0].name
    if ours == TABLE[1]:
        return TABLE[0]
    module, _, leaf = ours.rpartition(".")
    inside = module.removeprefix(f"{OURS}.")
    names = {ours: sat for sat, ours in (MODULES if module == inside else BLOCK_MODULES).items()}
    names |= {name: sat for sat, (_, targets) in BLOCK_PARTS.items() for name in targets if module != inside}
    return f"{names[inside]}.{leaf}".replace("{i}", "#")


SAT_PREFIX = PREFIX
SAT = renamed(MINDSPEED_MM, _sat_name, tensor_parallel=False, blocks="", ignored=NOT_WEIGHTS)

# SAT's adapters, with A and B as SAT has them (one pair for each of queries, keys and values), to ours.
SAT_LORA = re.compile(r"transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d)")


def rename_adapter(name: str) -> str:
    """SAT's and diffusers' names of half an adapter as ours; other names stay."""
    if (found := SAT_LORA.fullmatch(name)) is None:
        return name.removeprefix("transformer.") if name.startswith(f"transformer.{OURS[:-2]}") else name
    block, layer, half, number = found.groups()
    target = f"to_{'qkv'[int(number)]}" if layer == "query_key_value" else "to_out.0"
    return f"transformer_blocks.{block}.attn1.{target}.lora_{half}.weight"


def without_computed(state: State) -> State:
    """2B's table of positions, which SAT stores, is computed here. Its rows of text are zeros; learned ones are not."""
    table = state.get(TABLE[1])
    if table is None or bool(table.load()[0, 0].any()):
        return dict(state)
    return {name: value for name, value in state.items() if name != TABLE[1]}
