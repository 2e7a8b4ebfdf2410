# SPDX-License-Identifier: Apache-2.0
"""Open-Sora Plan v1.5 training checkpoints: tensor-parallel shards to one state dict and back.

On disk a training run of the original leaves ``latest_checkpointed_iteration.txt`` and, per iteration,
``iter_0001000/mp_rank_RR/model_optim_rng.pt`` for each tensor-parallel rank RR, with the weights under ``model`` and
their running average under ``ema_model``. Names are those of the model; only how some tensors are cut differs.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_COLUMN = re.compile(
    r"(.*\.)?(attn1\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj)|net\.0\.proj|norm(\d+|_out)\.linear)\.(weight|bias)"
)
_ROW = re.compile(r"(.*\.)?(attn1\.to_out\.0|attn1\.to_add_out|net\.2)\.weight")


def tensor_parallel_axis(name: str) -> int | None:
    """Axis along which the tensor of this name is cut over tensor-parallel ranks; None if each rank holds all of it.

    Cut along 0 (output features): attention inputs, first feed-forward linear, modulation linears. Cut along 1 (input
    features): attention outputs and second feed-forward linear, whose biases are replicated.
    """
    if _COLUMN.fullmatch(name):
        return 0
    return 1 if _ROW.fullmatch(name) else None


def merge_tensor_parallel(shards: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One full state dict from the state dicts of all tensor-parallel ranks, in rank order.

    Cut tensors are concatenated. Of replicated ones the last rank's copy is taken, as the original's merge does; a
    warning names those whose copies differ. Entries named ``_extra_state`` hold nothing and are dropped. Tensors that
    only exist when training with more than one rank (text outputs of the last block) are kept: the model's loader
    knows that they have no effect.

    Raises:
        ValueError: no shards, or ranks that do not hold the same names and matching shapes.
    """
    if not shards:
        raise ValueError("merge_tensor_parallel: shards must hold at least one rank, got none")
    ranks = [{name: value for name, value in shard.items() if not name.endswith("_extra_state")} for shard in shards]
    for rank, shard in enumerate(ranks):
        if differing := sorted(shard.keys() ^ ranks[0].keys()):
            raise ValueError(
                f"merge_tensor_parallel: rank {rank} and rank 0 must hold the same names, "
                f"{len(differing)} are in one of them only: {', '.join(differing[:10])}"
            )
    merged: dict[str, Tensor] = {}
    unequal: list[str] = []
    for name in ranks[0]:
        parts = [shard[name] for shard in ranks]
        axis = tensor_parallel_axis(name)
        _check_shapes(name, parts, axis)
        if axis is None:
            merged[name] = parts[-1]
            if not all(torch.equal(part, parts[-1]) for part in parts[:-1]):
                unequal.append(name)
        else:
            merged[name] = torch.cat(parts, dim=axis)
    if unequal:
        warnings.warn(
            f"merge_tensor_parallel: {len(unequal)} replicated tensors differ between ranks, the last rank's copy is "
            f"taken: {', '.join(unequal[:10])}",
            stacklevel=2,
        )
    return merged


def split_tensor_parallel(state: Mapping[str, Tensor], num_ranks: int) -> list[dict[str, Tensor]]:
    """The inverse of ``merge_tensor_parallel``: one state dict per rank; cut tensors are views of the given ones.

    Raises:
        ValueError: ``num_ranks < 1``, or a tensor that cannot be cut into that many equal parts.
    """
    if num_ranks < 1:
        raise ValueError(f"split_tensor_parallel: num_ranks must be at least 1, got {num_ranks}")
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
    for name, value in state.items():
        axis = tensor_parallel_axis(name)
        if axis is not None and value.shape[axis] % num_ranks:
            raise ValueError(
                f"split_tensor_parallel: axis {axis} of {name} must be divisible by {num_ranks}, "
                f"got shape {tuple(value.shape)}"
            )
        parts = [value] * num_ranks if axis is None else value.chunk(num_ranks, dim=axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    return shards


def load_tensor_parallel(folder: str | Path, *, key: str = "model", iteration: int | None = None) -> dict[str, Tensor]:
    """Read a training checkpoint of the original and merge its ranks.

    Args:
        folder: the run's save directory (with the tracker file), or one ``iter_*`` directory.
        key: "model", or "ema_model" for the running average, which is what was released.
        iteration: which one; default what the tracker file says.

    Returns:
        Full state dict on the CPU, memory-mapped where tensors are not cut.

    Raises:
        FileNotFoundError: no tracker, no such iteration, or no rank in it.
        ValueError: ranks missing, pipeline-parallel, unreadable without running code, or without ``key``.
    """
    source = _iteration_folder(Path(folder), iteration)
    names = sorted(path.name for path in source.glob("mp_rank_*"))
    if not names:
        raise FileNotFoundError(f"load_tensor_parallel: no mp_rank_* directory in {source}")
    expected = [f"mp_rank_{rank:02d}" for rank in range(len(names))]
    if names != expected:
        raise ValueError(
            f"load_tensor_parallel: {source} must hold {expected[0]} to {expected[-1]} and no pipeline stages, "
            f"got {', '.join(names[:10])}"
        )
    return merge_tensor_parallel([_read_weights(source / name / "model_optim_rng.pt", key) for name in names])


def _iteration_folder(folder: Path, iteration: int | None) -> Path:
    if iteration is None and folder.name.startswith("iter_"):
        return folder
    name = "" if iteration is None else str(iteration)
    if iteration is None:
        tracker = folder / "latest_checkpointed_iteration.txt"
        if not tracker.is_file():
            raise FileNotFoundError(f"load_tensor_parallel: {tracker} is missing; give iteration or an iter_* folder")
        name = tracker.read_text().strip()
    if name != "release" and not name.isdecimal():
        raise ValueError(f"load_tensor_parallel: tracker in {folder} must hold a number or 'release', got {name!r}")
    source = folder / (name if name == "release" else f"iter_{int(name):07d}")
    if not source.is_dir():
        raise FileNotFoundError(f"load_tensor_parallel: {source} is missing")
    return source


def _read_weights(file: Path, key: str) -> Mapping[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"load_tensor_parallel: {file} is missing")
    # the training arguments beside the weights are a Namespace: a plain record, whose loading runs no code
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"load_tensor_parallel: {file} holds objects that are not plain data: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"load_tensor_parallel: {file} must hold weights under {key!r}, got {found}")
    return content[key]


def _check_shapes(name: str, parts: Sequence[Any], axis: int | None) -> None:
    for rank, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise ValueError(f"merge_tensor_parallel: {name} must be a tensor, rank {rank} has {type(part).__name__}")
        shape, first = list(part.shape), list(parts[0].shape)
        if axis is not None and axis >= part.dim():
            raise ValueError(f"merge_tensor_parallel: {name} must have an axis {axis}, rank {rank} has {tuple(shape)}")
        if shape != first or part.dtype != parts[0].dtype:
            raise ValueError(
                f"merge_tensor_parallel: {name} must have one shape and dtype on all ranks, rank 0 has "
                f"{tuple(first)} of {parts[0].dtype}, rank {rank} {tuple(shape)} of {part.dtype}"
            )
