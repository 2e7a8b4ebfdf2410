# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of CogVideoX call its tensors: SAT's names to ours, which are diffusers', and back.

A SAT file is ``transformer/<1|1000>/mp_rank_00_model_states.pt``. Values carry over as they are; two tensors are cut
up: the fused query, key and value projection into thirds, and the modulation of a block, whose twelve parts SAT orders
by stream (video, then text) and ours by norm (attention, then feed-forward).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import CogVideoXConfig

# Where a file that is not a flat map keeps the weights; each is looked for inside what the one before it held.
WRAPPERS = ("model", "module", "state_dict")
PREFIX = "model.diffusion_model."

# What SAT stores beside the weights: tables that are computed here, and embeddings of SAT's own that nothing reads.
NOT_WEIGHTS = ("mixins.pos_embed.freqs_*", "*embed_tokens*", "*word_embeddings*", "*position_embedding*")

# SAT's module and ours.
MODULES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}
TABLE = ("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding")

# The same inside block {i}.
BLOCK_MODULES = {
    "mixins.adaln_layer.query_layernorm_list.{i}": "attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{i}": "attn1.norm_k",
    "transformer.layers.{i}.input_layernorm": "norm1.norm",
    "transformer.layers.{i}.attention.dense": "attn1.to_out.0",
    "transformer.layers.{i}.post_attention_layernorm": "norm2.norm",
    "transformer.layers.{i}.mlp.dense_h_to_4h": "ff.net.0.proj",
    "transformer.layers.{i}.mlp.dense_4h_to_h": "ff.net.2",
}

# SAT's tensor, into how many equal parts it is cut, and which of them make up ours, in order.
BLOCK_PARTS: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "transformer.layers.{i}.attention.query_key_value": (
        3,
        {"attn1.to_q": (0,), "attn1.to_k": (1,), "attn1.to_v": (2,)},
    ),
    "mixins.adaln_layer.adaLN_modulations.{i}.1": (
        12,
        {"norm1.linear": (0, 1, 2, 6, 7, 8), "norm2.linear": (3, 4, 5, 9, 10, 11)},
    ),
}


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A file of SAT or of diffusers as a flat map in our names. What this table does not know keeps its name.

    Raises:
        ValueError: a fused tensor whose first axis does not divide into its parts.
    """
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    return from_sat(state) if any(str(key).startswith(PREFIX) for key in state) else dict(state)


def from_sat(state: Mapping[str, Any]) -> dict[str, Any]:
    """SAT's flat map in our names. Tensors outside its diffusion model (first stage, conditioner) are left out."""
    result: dict[str, Any] = {}
    for full_name, value in state.items():
        name = str(full_name).removeprefix(PREFIX)
        if name == full_name or any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_WEIGHTS):
            continue
        module, _, leaf = name.rpartition(".")
        index = re.search(r"\.(\d+)(\.|$)", module)
        form = module if index is None else f"{module[: index.start(1)]}{{i}}{module[index.end(1) :]}"
        if name == TABLE[0]:
            result[TABLE[1]] = value
        elif module in MODULES:
            result[f"{MODULES[module]}.{leaf}"] = value
        elif index is not None and form in BLOCK_MODULES:
            result[f"transformer_blocks.{index[1]}.{BLOCK_MODULES[form]}.{leaf}"] = value
        elif index is not None and form in BLOCK_PARTS:
            count, targets = BLOCK_PARTS[form]
            if value.shape[0] % count:
                raise ValueError(f"from_sat: {full_name} must divide into {count} parts, got {tuple(value.shape)}")
            parts = value.chunk(count)
            for target, chosen in targets.items():
                joined = torch.cat([parts[i] for i in chosen])
                result[f"transformer_blocks.{index[1]}.{target}.{leaf}"] = joined
        else:
            result[name] = value
    return result


def to_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_sat`: our flat map in SAT's names, with its prefix, unwrapped.

    Tables that SAT stores though they are constants (2B's positions, rotary frequencies) are not among them.

    Raises:
        ValueError: a name that is not ours, or a part of a fused tensor without the others.
    """
    modules = {ours: sat for sat, ours in MODULES.items()}
    block_modules = {ours: sat for sat, ours in BLOCK_MODULES.items()}
    fused = {ours: sat for sat, (_, targets) in BLOCK_PARTS.items() for ours in targets}
    result: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if name == TABLE[1]:
            result[PREFIX + TABLE[0]] = value
        elif module in modules:
            result[f"{PREFIX}{modules[module]}.{leaf}"] = value
        elif block is not None and block[2] in block_modules:
            result[f"{PREFIX}{block_modules[block[2]].format(i=block[1])}.{leaf}"] = value
        elif block is not None and block[2] in fused:
            target = f"{PREFIX}{fused[block[2]].format(i=block[1])}.{leaf}"
            if target not in result:
                result[target] = fuse(state, f"transformer_blocks.{block[1]}", leaf, *BLOCK_PARTS[fused[block[2]]])
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"to_sat: {len(unknown)} names are not those of CogVideoX: {', '.join(unknown[:10])}")
    return result


def fuse(
    state: Mapping[str, Tensor], block: str, leaf: str, count: int, targets: Mapping[str, tuple[int, ...]]
) -> Tensor:
    """Put the parts of a SAT tensor back into its order."""
    parts: dict[int, Tensor] = {}
    for target, chosen in targets.items():
        name = f"{block}.{target}.{leaf}"
        if name not in state:
            raise ValueError(f"to_sat: {name} is missing: SAT keeps it in one tensor with {', '.join(targets)}")
        parts.update(zip(chosen, state[name].chunk(len(chosen)), strict=True))
    return torch.cat([parts[i] for i in range(count)])


def fit_state_dict(state: Mapping[str, Any], config: CogVideoXConfig) -> dict[str, Any]:
    """The patch projection in the rank that the model has: 1.0 keeps ``(D, C, p, p)``, later code ``(D, C p p)``."""
    result, name = dict(state), "patch_embed.proj.weight"
    weight = result.get(name)
    if isinstance(weight, Tensor):
        frames, rows, columns = config.patch
        shape = (config.hidden_size, config.in_channels, rows, columns)
        if config.patch_size_t is None and tuple(weight.shape) == (shape[0], shape[1] * rows * columns):
            result[name] = weight.reshape(shape)
        elif config.patch_size_t is not None and tuple(weight.shape) == (*shape[:2], frames, rows, columns):
            result[name] = weight.flatten(1)
    return result


def ignored_keys(config: CogVideoXConfig) -> tuple[str, ...]:
    """Patterns of names that a checkpoint may hold and the model has no use for: 2B's table, which is computed."""
    return () if config.use_learned_positional_embeddings else (TABLE[1],)
