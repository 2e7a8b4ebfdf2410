# SPDX-License-Identifier: Apache-2.0
"""Trees of training checkpoints: Megatron's and MindSpeed-MM's ranks and stages, and layerzero's flat shards.

::

    ROOT/latest_checkpointed_iteration.txt      "release" or the number of an iteration
    ROOT/release/ or ROOT/iter_0000100/
        mp_rank_TT/model_optim_rng.pt           TT: tensor-parallel rank
        mp_rank_TT_PPP/model_optim_rng.pt       PPP: pipeline stage, if there are several
        model_R.pt                              layerzero instead: R is the rank in the whole job

A file holds weights under ``model`` and perhaps their running average under ``ema_model``; where a stage has several
chunks they are ``model0``, ``model1``, ... Chunk v of stage p is number v P + p of the model, and blocks are counted
from 0 in each chunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch

from .hf import SHOWN, paragraph, with_nearest
from .layout import Layout, Split
from .lazy import Lazy, State, TorchFile, chunk, is_tensor, join

TRACKER = "latest_checkpointed_iteration.txt"
TRACKERS = (TRACKER, "latest_checkpointed_iterations.txt")  # the second is a guide's misspelling, only ever read
RANK_FILE = "model_optim_rng.pt"
ITERATION = re.compile(r"iter_(\d{7,})")
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
FLAT_FILE = re.compile(r"model_(\d+)\.pt")
WRAPPER = re.compile(r"(^|\.)_\w*wrapped_module(?=\.)")
Stages = Sequence[Sequence[int]]  # layers of each chunk: [chunk of a stage][stage]


# Finding


def find_iteration(root: Path, iteration: int | None = None) -> Path | None:
    """The folder with the rank files that ``root`` is or leads to; None where ``root`` is no such tree.

    Without a tracker file the newest iteration is taken, as layerzero's own scripts do.

    Raises:
        ValueError: the tracker says nothing sensible, or the iteration is not there.
    """
    if iteration is None and _rank_files(root):
        return root
    trackers = [root / name for name in TRACKERS if (root / name).is_file()]
    folders = sorted(f for f in root.iterdir() if f.is_dir() and (ITERATION.fullmatch(f.name) or f.name == "release"))
    if not trackers and not any(_rank_files(folder) for folder in folders):
        return None
    if iteration is not None:
        name = f"iter_{iteration:07d}"
    elif trackers:
        said = {tracker.read_text(errors="replace").strip() for tracker in trackers}
        if len(said) > 1:
            raise ValueError(f"{root}: {' and '.join(TRACKERS)} disagree: {' and '.join(map(repr, sorted(said)))}")
        word = said.pop()
        if word != "release" and not re.fullmatch(r"[0-9]+", word):
            raise ValueError(f"{trackers[0]} must hold a number or 'release', got {word[:80]!r}")
        name = word if word == "release" else f"iter_{int(word):07d}"
    else:
        numbered = [folder for folder in folders if ITERATION.fullmatch(folder.name)] or folders
        name = max(numbered, key=lambda folder: (len(folder.name), folder.name)).name
    if not _rank_files(root / name):
        there = ", ".join(folder.name for folder in folders[:SHOWN]) or "none"
        raise ValueError(f"{root / name} has no mp_rank_* folders and no model_*.pt files; iterations here: {there}")
    return root / name


def _rank_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [*folder.glob("mp_rank_*/*.pt"), *folder.glob("model_*.pt")]
    return [f for f in found if f.name == RANK_FILE or FLAT_FILE.fullmatch(f.name)]


def is_layerzero(folder: Path) -> bool:
    """Whether an iteration holds layerzero's shards."""
    return any(FLAT_FILE.fullmatch(f.name) for f in folder.iterdir())


# Reading


@dataclass(frozen=True)
class Tree:
    """The shards of a model, still in their files.

    Args:
        folder: of the iteration.
        chunks: state of every tensor-parallel rank, for every chunk in the order of the model.
        stages: number of pipeline stages, of which chunk i is on stage ``i % stages``.
    """

    folder: Path
    chunks: list[list[State]]
    stages: int

    @property
    def tensor_parallel(self) -> int:
        return len(self.chunks[0])

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for ranks in self.chunks for state in ranks for name in state))

    def place(self, index: int, rank: int) -> str:
        """The folder of a shard, and the chunk in it if there are several, for messages."""
        name = rank_folder(rank, index % self.stages, self.stages)
        return name if len(self.chunks) == self.stages else f"{name}, model{index // self.stages}"

    def renamed(self, rename: Callable[[str], str | None]) -> Tree:
        """The same tree with other names; those that become None are left out."""
        chunks = [
            [{new: t for name, t in state.items() if (new := rename(name)) is not None} for state in ranks]
            for ranks in self.chunks
        ]
        return replace(self, chunks=chunks)


def read_tree(folder: Path, *, ema: bool = False) -> Tree:
    """Open the rank files of an iteration.

    Args:
        folder: with ``mp_rank_*`` folders.
        ema: the running average instead of the weights.

    Raises:
        ValueError: ranks or stages missing, or files without such weights.
    """
    ranks: dict[tuple[int, int], Path] = {}
    with_stage = set()
    for path in sorted(folder.glob("mp_rank_*")):
        if (match := RANK.fullmatch(path.name)) is None:
            raise ValueError(f"{path} is not of the form mp_rank_TT or mp_rank_TT_PPP")
        ranks[int(match[1]), int(match[2] or 0)] = path / RANK_FILE
        with_stage.add(match[2] is not None)
    if len(with_stage) > 1:
        raise ValueError(f"{folder} mixes mp_rank_TT and mp_rank_TT_PPP folders: which ones are the model?")
    num_ranks, num_stages = (max(key[i] for key in ranks) + 1 for i in (0, 1))
    there = {key for key, path in ranks.items() if path.is_file()}
    if count := num_ranks * num_stages - len(there):
        every = ((t, p) for t in range(num_ranks) for p in range(num_stages))
        absent = islice((key for key in every if key not in there), SHOWN)
        words = ", ".join(rank_folder(t, p, 2 if True in with_stage else 1) for t, p in absent)
        raise ValueError(f"{folder} lacks {RANK_FILE} of {count} shards: {words}")
    files = {key: TorchFile(path) for key, path in ranks.items()}
    counts = {key: _num_chunks(file, ema) for key, file in files.items()}
    if len(set(counts.values())) > 1:
        words = ", ".join(f"{files[key].path.parent.name}: {n}" for key, n in list(counts.items())[:SHOWN])
        raise ValueError(f"{folder}: stages must have the same number of chunks (model0, model1, ...), got {words}")
    key, num_chunks = ("ema_model" if ema else "model"), counts[0, 0]
    chunks = [
        [_weights(files[t, p], f"{key}{v if num_chunks else ''}") for t in range(num_ranks)]
        for v in range(max(num_chunks, 1))
        for p in range(num_stages)
    ]
    return Tree(folder, chunks, num_stages)


def _num_chunks(file: TorchFile, ema: bool) -> int:
    """How many numbered chunks a file has; 0 where weights stand under the plain key."""
    key = "ema_model" if ema else "model"
    content = file.content()
    if isinstance(content.get(key), Mapping):
        return 0
    numbers = sorted(int(m[1]) for name in content if (m := re.fullmatch(rf"{key}(\d+)", str(name))))
    if not numbers or numbers != list(range(len(numbers))):
        found = ", ".join(map(str, list(content)[:SHOWN]))
        raise ValueError(f"{file.path} must hold weights under {key!r}, or {key}0, {key}1, ...; got {found}")
    return len(numbers)


def _weights(file: TorchFile, key: str) -> State:
    content = file.content()[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{file.path}: {key} must be a map of names to tensors, got {type(content).__name__}")
    # MindSpeed-MM's layerzero converter wraps the weights once more.
    keys = (key, "model") if isinstance(content.get("model"), Mapping) else (key,)
    inner = content["model"] if len(keys) == 2 else content
    wrong = [str(name) for name, value in inner.items() if not is_tensor(value) and not _is_extra(str(name))]
    if wrong:
        raise ValueError(f"{file.path}: under {key} are {len(wrong)} entries that are no tensors: {wrong[:SHOWN]}")
    return {name: value for name, value in file.state(*keys).items() if not _is_extra(name)}


def _is_extra(name: str) -> bool:
    return name.endswith("_extra_state")


def merge(tree: Tree, layout: Layout, *, lora: bool = False) -> State:
    """One state with the names of ``layout`` from all shards, blocks counted through.

    Replicated tensors are read and compared; the others stay in their files.

    Args:
        tree: shards, in the names of ``layout``.
        layout: says what is cut and where what lies.
        lora: the shards hold adapters, named after the tensors that they change.

    Raises:
        ValueError: ranks that do not have the same names, shapes and dtypes or whose replicated tensors differ; blocks
            that are not counted from 0; tensors on a stage that should not have them.
    """
    what = str(tree.folder)
    if tree.tensor_parallel > 1 and not layout.tensor_parallel:
        raise ValueError(f"{what}: {layout.model} is not cut over tensor-parallel ranks, got {tree.tensor_parallel}")
    if len(tree.chunks) > 1 and not layout.blocks:
        raise ValueError(f"{what}: {layout.model} is not cut into pipeline stages, got {tree.stages}")
    merged: State = {}
    before = 0
    for index, ranks in enumerate(tree.chunks):
        places = [tree.place(index, rank) for rank in range(len(ranks))]
        _check_ranks(ranks, places, what)
        local = _check_blocks(ranks[0], layout, f"{what}, {places[0]}")
        _check_stage(ranks[0], layout, index, len(tree.chunks), f"{what}, {places[0]}")
        for name in ranks[0]:
            split = lora_split(layout, name) if lora else _split_of(layout, name)
            block = layout.block_of(name)
            full = name if block is None else layout.with_block(name, block + before)
            merged[full] = _join([state[name] for state in ranks], split, name, places, what)
        before += local
    return merged


def _split_of(layout: Layout, name: str) -> Split:
    """Unknown names are replicated here; the check of the whole names them all."""
    return "replicated" if layout.match(name, "theirs") is None else layout.split_of(name)


def lora_split(layout: Layout, name: str) -> Split:
    """How an adapter's half is cut: A takes what goes into a layer, B gives what comes out."""
    match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
    split = _split_of(layout, f"{match[1]}.weight") if match else "replicated"
    if match is None or split == "replicated" or (split == "row") != (match[2] == "A"):
        return "replicated"
    return split


def _check_ranks(ranks: Sequence[State], places: Sequence[str], what: str) -> None:
    for state, place in zip(ranks[1:], places[1:], strict=True):
        missing, extra = [n for n in ranks[0] if n not in state], [n for n in state if n not in ranks[0]]
        shapes = [
            f"{name}: {places[0]} has {ranks[0][name].shape} of {ranks[0][name].dtype}, {place} {t.shape} of {t.dtype}"
            for name, t in state.items()
            if name in ranks[0] and (t.shape, t.dtype) != (ranks[0][name].shape, ranks[0][name].dtype)
        ]
        found = [
            *paragraph(f"missing in {place}", [with_nearest(n, extra) for n in missing[:SHOWN]], len(missing)),
            *paragraph(f"missing in {places[0]}", [with_nearest(n, missing) for n in extra[:SHOWN]], len(extra)),
            *paragraph("of another shape or dtype", shapes[:SHOWN], len(shapes)),
        ]
        if found:
            raise ValueError(f"{what}: tensor-parallel ranks must hold the same tensors\n" + "\n".join(found))


def _check_blocks(state: State, layout: Layout, what: str) -> int:
    """The number of blocks in a chunk, which must be counted from 0."""
    blocks = {block for name in state if (block := layout.block_of(name)) is not None}
    if blocks != set(range(len(blocks))):
        absent = [i for i in range(len(blocks)) if i not in blocks]
        words = ", ".join(f"{layout.blocks}{i}" for i in absent[:SHOWN])
        raise ValueError(f"{what}: blocks of a shard must be counted from 0, missing: {words}")
    return len(blocks)


def _check_stage(state: State, layout: Layout, index: int, count: int, what: str) -> None:
    """Tensors outside blocks lie in the first or the last chunk."""
    if count == 1:
        return
    wrong = []
    for name in state:
        if layout.block_of(name) is None and layout.match(name, "theirs") is not None:
            wanted = count - 1 if layout.on_last_stage(name) else 0
            if index != wanted:
                wrong.append(f"{name}: belongs to chunk {wanted} of the model, lies in {index}")
    if wrong:
        raise ValueError(f"{what}\n" + "\n".join(paragraph("on another stage", wrong[:SHOWN], len(wrong))))


def _join(parts: list[Lazy], split: Split, name: str, places: Sequence[str], what: str) -> Lazy:
    if split == "replicated":
        for part, place in zip(parts[1:], places[1:], strict=True):
            if not torch.equal(part.load(), parts[0].load()):
                raise ValueError(f"{what}: {name} must be the same on all ranks, {places[0]} and {place} differ")
        return parts[0]
    axis = 1 if split == "row" else 0
    if len(parts[0].shape) <= axis:
        raise ValueError(f"{what}: {name} must have an axis {axis} to be cut along, got {parts[0].shape}")
    if split != "qkv" or len(parts) == 1:
        return join(parts, axis)
    if parts[0].shape[0] % 3:
        raise ValueError(f"{what}: {name} must hold queries, keys and values of equal size, got {parts[0].shape}")
    thirds = [chunk(part, 0, 3) for part in parts]
    return join([third[i] for i in range(3) for third in thirds], 0)


def read_layerzero(folder: Path, *, ema: bool = False) -> State:
    """One state from layerzero's flat shards.

    Every rank of a sharding group holds a run of each parameter's values, in the order of ranks; groups beyond the
    first repeat it. Parameters without a shard record are whole on every rank. Names keep the trainer's prefix.

    Raises:
        ValueError: ranks missing, tensor or pipeline parallelism (which layerzero checkpoints of these models do not
            have), shards that do not fill their shape, or copies that differ.
    """
    found = sorted((int(m[1]), f) for f in folder.iterdir() if (m := FLAT_FILE.fullmatch(f.name)))
    files = [TorchFile(path) for _, path in found]
    contents = [file.content() for file in files]
    key = "ema_model" if ema else "model"
    for file, content in zip(files, contents, strict=True):
        if not isinstance(content.get(key), Mapping):
            raise ValueError(f"{file.path} must hold weights under {key!r}, got {', '.join(map(str, content))[:200]}")
        parallel = _record(file, content, "parallel_state")
        for what in ("tp", "pp"):
            if parallel.get(f"{what}_degree", 1) != 1:
                raise ValueError(f"{file.path}: {what}_degree must be 1, got {parallel[f'{what}_degree']}")
    ranks = [
        _record(file, file.content(), "parallel_state").get("global_rank", number)
        for file, (number, _) in zip(files, found, strict=True)
    ]
    if set(ranks) != set(range(len(ranks))):
        raise ValueError(f"{folder} must hold the ranks 0, 1, ... once each, got {ranks[:SHOWN]}")
    order = sorted(range(len(files)), key=lambda i: ranks[i])
    states = [files[i].state(key) for i in order]
    places = [files[i].path.name for i in order]
    for state, place in zip(states, places, strict=True):
        if other := sorted(state.keys() ^ states[0].keys()):
            raise ValueError(f"{folder}: {place} and {places[0]} must hold the same names, differ in {other[:SHOWN]}")
    records = _record(files[order[0]], contents[order[0]], "shard_state_dict")
    result: State = {}
    for name in states[0]:
        clean = WRAPPER.sub(r"\1", name).replace("..", ".").lstrip(".")
        parts = [state[name] for state in states]
        shape = _record_shape(records.get(clean, records.get(name)), f"{places[0]}, {name}")
        if not _is_extra(name):
            result[clean] = _unflatten(parts, shape, name, places, str(folder))
    return result


def _record(file: TorchFile, content: Mapping[Any, Any], key: str) -> Mapping[Any, Any]:
    found = content.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{file.path}: {key} must be a map, got {type(found).__name__}")
    return found


def _record_shape(record: Any, what: str) -> tuple[int, ...] | None:
    """The shape in a shard's record, which is an object of the trainer or a map; None where there is no record."""
    if record is None:
        return None
    shape = record.get("shape") if isinstance(record, Mapping) else getattr(record, "shape", None)
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{what}: its record must have a shape, got {shape!r}")
    return tuple(shape)


def _unflatten(parts: list[Lazy], shape: tuple[int, ...] | None, name: str, places: Sequence[str], what: str) -> Lazy:
    if shape is None:
        return _join(parts, "replicated", name, places, what)
    whole, dtype = math.prod(shape), parts[0].dtype
    wrong = [f"{place}: {p.shape} of {p.dtype}" for p, place in zip(parts, places, strict=True) if _not_flat(p, dtype)]
    if wrong:
        raise ValueError(f"{what}: shards of {name} must be flat and of one dtype, got {', '.join(wrong[:SHOWN])}")
    lengths = [p.shape[0] for p in parts]
    ends = set(accumulate(lengths))
    copies, rest = divmod(sum(lengths), whole) if whole else (1, sum(lengths))
    if rest or not copies or any(whole * (i + 1) not in ends for i in range(copies)):
        raise ValueError(f"{what}: shards of {name} must fill {shape}, which has {whole} values, got {lengths[:SHOWN]}")
    groups: list[list[Lazy]] = [[] for _ in range(copies)]
    filled = 0
    for part in parts:
        if part.shape[0]:
            groups[filled // whole].append(part)
            filled += part.shape[0]
    fulls = [_flat(group, shape, dtype) for group in groups]
    return _join(fulls, "replicated", name, [f"copy {i} of the shards" for i in range(copies)], what)


def _not_flat(part: Lazy, dtype: torch.dtype) -> bool:
    return len(part.shape) != 1 or part.dtype != dtype


def _flat(parts: list[Lazy], shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    def load() -> torch.Tensor:
        return torch.cat([p.load() for p in parts]).reshape(shape) if parts else torch.empty(shape, dtype=dtype)

    return Lazy(shape, dtype, load)


# Writing


def rank_folder(rank: int, stage: int, num_stages: int) -> str:
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if num_stages > 1 else "")


def check_stages(stages: Stages, num_blocks: int, layout: Layout) -> None:
    """Raise ValueError unless ``stages`` is a way in which ``layout`` cuts that many blocks."""
    form = "[" + ", ".join(str(list(row)) for row in stages) + "]"
    uneven = not stages or not stages[0] or len({len(row) for row in stages}) > 1
    if uneven or any(number < 0 for row in stages for number in row):
        raise ValueError(f"pipeline stages must be equally long rows of layer counts from 0 on, got {form}")
    if len(stages[0]) * len(stages) > 1 and not layout.blocks:
        raise ValueError(f"{layout.model} cannot be cut into pipeline stages, got {form}")
    if len(stages) > 1 and not layout.virtual_stages:
        raise ValueError(f"{layout.model} cannot have virtual pipeline stages, got {form}")
    if len(stages) > 1 and len(stages[0]) == 1:
        raise ValueError(f"virtual pipeline stages need several stages, got {form}")
    total = sum(sum(row) for row in stages)
    if layout.blocks and total != num_blocks:
        raise ValueError(f"pipeline stages {form} have {total} layers together, the model has {num_blocks}")


def split(
    state: Mapping[str, Lazy], layout: Layout, num_ranks: int = 1, stages: Stages | None = None
) -> dict[str, dict[str, Any]]:
    """Cut a whole, checked state in the names of ``layout`` into the contents of rank files, by folder name.

    Args:
        state: all tensors.
        layout: says what is cut and where what lies.
        num_ranks: tensor-parallel ranks.
        stages: blocks of each chunk, a row for each chunk of a stage; None: the whole model.

    Raises:
        ValueError: tensors that cannot be cut into equal parts, or stages that do not fit the model.
    """
    if num_ranks < 1:
        raise ValueError(f"tensor-parallel ranks must be at least 1, got {num_ranks}")
    if num_ranks > 1 and not layout.tensor_parallel:
        raise ValueError(f"{layout.model} cannot be cut over tensor-parallel ranks, got {num_ranks}")
    blocks = [block for name in state if (block := layout.block_of(name)) is not None]
    num_blocks = max(blocks, default=-1) + 1
    stages = ((num_blocks,),) if stages is None else stages
    check_stages(stages, num_blocks, layout)
    num_chunks, num_stages = len(stages), len(stages[0])
    check_cuts(state, layout, num_ranks)
    flat = [n for row in stages for n in row]
    starts = [0, *accumulate(flat)]
    whole = num_chunks * num_stages == 1
    files: dict[str, dict[str, Any]] = {}
    for stage in range(num_stages):
        for rank in range(num_ranks):
            content: dict[str, Any] = {}
            for v in range(num_chunks):
                index = v * num_stages + stage
                key = "model" if num_chunks == 1 else f"model{v}"
                content[key] = {
                    local: part_of(t, layout.split_of(name), num_ranks, rank)
                    for name, t in state.items()
                    if (local := name if whole else _local(name, layout, starts, index)) is not None
                }
            if num_chunks > 1:
                content["checkpoint_version"] = 3.0
            files[rank_folder(rank, stage, num_stages)] = content
    return files


def _local(name: str, layout: Layout, starts: Sequence[int], index: int) -> str | None:
    """The name of a tensor in a chunk, None if it lies in another one."""
    block = layout.block_of(name)
    if block is not None:
        inside = starts[index] <= block < starts[index + 1]
        return layout.with_block(name, block - starts[index]) if inside else None
    last = len(starts) - 2
    return name if index == (last if layout.on_last_stage(name) else 0) else None


def check_cuts(state: Mapping[str, Lazy], layout: Layout, num_ranks: int) -> None:
    """Raise ValueError unless every tensor, in the names of ``layout``, divides into so many ranks."""
    uneven = [problem for name, t in state.items() if (problem := _uneven(name, t, layout, num_ranks))]
    if uneven:
        words = "\n".join(paragraph("that cannot be cut", uneven[:SHOWN], len(uneven)))
        raise ValueError(f"{layout.model}: tensors must divide into {num_ranks} ranks\n{words}")


def _uneven(name: str, tensor: Lazy, layout: Layout, num_ranks: int) -> str | None:
    kind = layout.split_of(name)
    if kind == "replicated" or num_ranks == 1:
        return None
    axis, parts = (1 if kind == "row" else 0), num_ranks * (3 if kind == "qkv" else 1)
    if tensor.shape[axis] % parts:
        return f"{name}: axis {axis} must be a multiple of {parts}, got {tensor.shape}"
    return None


def part_of(tensor: Lazy, kind: Split, num_ranks: int, rank: int) -> Lazy:
    """What one tensor-parallel rank has of a tensor."""
    if kind == "replicated" or num_ranks == 1:
        return tensor
    if kind == "qkv":
        return join([chunk(third, 0, num_ranks)[rank] for third in chunk(tensor, 0, 3)], 0)
    return chunk(tensor, 1 if kind == "row" else 0, num_ranks)[rank]


def tree_files(files: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Paths below the root of a release and what goes there: the tracker, then every rank file."""
    yield TRACKER, "release"
    for folder, content in files.items():
        yield f"release/{folder}/{RANK_FILE}", content
