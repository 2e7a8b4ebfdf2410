# SPDX-License-Identifier: Apache-2.0
"""Weights of tensor-parallel models in the files that MindSpeed-MM's tensor-parallel ranks read and write.

Where both cut a tensor alike, a rank's part goes into its own file and comes from there. Other tensors are gathered
and cut anew, one at a time.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vidgen import io
from vidgen.checkpoints import convert, megatron
from vidgen.checkpoints.layout import Layout as Table
from vidgen.checkpoints.layout import Row, fill
from vidgen.checkpoints.lazy import Lazy, State, lazy, write_torch

from .agree import together
from .layout import Layout
from .sharding import local
from .tensor import PartialLinear, reordered, row_order, usual_order

Axis = int | None  # that a parameter is cut along over the tensor ranks; None: it is whole
FUSED = -1  # cut in several runs of indices


def save_rank_files(model: nn.Module, layout: Layout, root: str | Path, naming: str = "mindspeed-mm") -> None:
    """Write ``root/release/mp_rank_TT/model_optim_rng.pt`` of every tensor rank, and the tracker file.

    The same files as ``vidgen convert --to mindspeed-mm --tp RANKS`` makes of the whole model. A system that does not
    cut a model over ranks gets one file. All ranks call this; the folder must be the same one on all of them.

    Args:
        model: after ``tensor_parallel`` and perhaps ``shard_model``.
        naming: "mindspeed-mm", or another that ``vidgen.checkpoints.convert.MODELS`` has for the model.

    Raises:
        ValueError: on all ranks: the system has no such model or cannot cut it so, or ``root`` exists.
    """
    root, world, ranks = Path(root), layout.group("world"), layout.size("tensor")

    def check() -> None:
        if root.exists():
            raise ValueError(f"save_rank_files: {root} exists already: choose another folder")
        table = table_of(model, layout, naming)
        own = {name: shape_of(t) for name, t in model.state_dict().items()}
        table.check(own, "ours", "the model")
        theirs = table.to_theirs(own)
        table.check(theirs, "theirs", "the result")
        if table.tensor_parallel:
            megatron.check_cuts(theirs, table, ranks)

    together(check, world)
    table = table_of(model, layout, naming)
    count = ranks if table.tensor_parallel else 1
    rank = layout.rank("tensor")
    writes = rank < count and layout.rank("replicate") == 0 and layout.rank("fsdp") == 0
    content = own_content(model, table, rank, count, writes)
    with ExitStack() as stack:

        def make() -> Path | None:
            if layout.rank("world"):
                return None
            root.absolute().parent.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(io.atomic_directory(root))

        folder = together(make, world, OSError)[0]
        assert folder is not None

        def write() -> None:
            if writes:
                path = folder / "release" / megatron.rank_folder(rank, 0, 1) / megatron.RANK_FILE
                path.parent.mkdir(parents=True, exist_ok=True)
                write_torch(path, {"model": content})
            if layout.rank("world") == 0:
                (folder / megatron.TRACKER).write_text("release")

        together(write, world, OSError)
        together(stack.close, world, OSError)


def own_content(model: nn.Module, table: Table, rank: int, count: int, keep: bool) -> State:
    """What the file of one of ``count`` ranks holds. All ranks of the layout call this together."""
    axes, orders, state = axes_of(model), row_order(model), model.state_dict()
    alike: State = {}
    other: State = {}
    for row, names in rows_of(table, state):
        if count > 1 and cut_alike(row, [axes.get(name) for name in names]):
            for name in names:
                part = without_shards(state[name])
                if keep:
                    alike[name] = on_host(part)
            continue
        wholes: State = {}
        for name in names:
            t = state[name]
            whole = usual_order(t.full_tensor() if isinstance(t, DTensor) else t, orders.get(name))
            if keep:
                wholes[name] = lazy(whole.detach())
        for name, t in table.to_theirs(wholes).items():
            other[name] = on_host(megatron.part_of(t, table.split_of(name), count, rank).load())
    return {**table.to_theirs(alike), **other}


def load_rank_files(
    model: nn.Module, layout: Layout, source: str | Path, naming: str = "mindspeed-mm", *, ema: bool = False
) -> None:
    """Load the weights that any number of tensor-parallel ranks wrote into a model that is cut, or sharded, in any way.

    All ranks call this and read the files themselves: a rank its own one where both cut alike. ``ema``: the running
    average instead of the weights.

    Raises:
        ValueError: on all ranks: files that are missing, damaged, disagree or do not fit the model.
    """
    source, world, ranks = Path(source), layout.group("world"), layout.size("tensor")

    def read() -> tuple[Table, megatron.Tree, State]:
        table = table_of(model, layout, naming)
        folder = megatron.find_iteration(source) if source.is_dir() else None
        if folder is None:
            raise ValueError(f"load_rank_files: {source} must hold mp_rank_* folders")
        tree = megatron.read_tree(folder, ema=ema)
        merged = megatron.merge(tree, table)
        table.check(merged, "theirs", str(source))
        return table, tree, convert.fitted(table.to_ours(merged), model)  # type: ignore[arg-type]

    found: list[tuple[Table, megatron.Tree, State]] = []
    together(lambda: found.append(read()), world)
    table, tree, whole = found[0]
    axes, orders, state = axes_of(model), row_order(model), model.state_dict()
    own: State = {}
    if tree.tensor_parallel == ranks > 1 and len(tree.chunks) == 1:
        own = table.to_ours(tree.chunks[0][layout.rank("tensor")])

    def load() -> None:
        for row, names in rows_of(table, state):
            alike = own and cut_alike(row, [axes.get(name) for name in names])
            for name in names:
                axis = axes.get(name)
                if alike and axis is not None:
                    part = own[name].load()
                    copy_box(state[name], part, axis, layout.rank("tensor") * part.shape[axis])
                else:
                    copy_box(state[name], reordered(whole[name].load(), orders.get(name)))

    together(load, world)


def table_of(model: nn.Module, layout: Layout, naming: str) -> Table:
    """What another system calls the tensors of a model and how it cuts them. Raises ValueError."""
    if layout.size("pipeline") > 1:
        raise ValueError(
            f"rank files are those of a whole model: pipeline must be 1, got {layout.size('pipeline')}; export the "
            "checkpoint to a model folder, and cut that with `vidgen convert --pp`"
        )
    entry = convert.entry_of(model)
    if naming not in entry.layouts:
        raise ValueError(f"naming must be one of {', '.join(entry.layouts)}, got {naming!r}")
    table = entry.layout(naming)
    if reason := table.refusal(getattr(model, "config", None)):
        raise ValueError(reason)
    return table


def rows_of(table: Table, state: dict[str, Tensor]) -> list[tuple[Row, list[str]]]:
    """Every tensor of theirs, with the names of ours that it holds."""
    found = []
    for name in state:
        if (match := table.match(name, "ours")) is not None and match[1] == 0:
            row, _, numbers = match
            found.append((row, [fill(part.name, numbers) for part in row.parts]))
    return found


def axes_of(model: nn.Module) -> dict[str, int]:
    """The axes of parameters that the tensor ranks cut."""
    axes = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PartialLinear):
            fused = len(module.sections_of_axis) > 1
            axes[f"{prefix}.weight"] = FUSED if fused else 1 if module.way == "row" else 0
            if module.bias is not None and module.way != "row":
                axes[f"{prefix}.bias"] = FUSED if fused else 0
    return axes


def cut_alike(row: Row, axes: list[Axis]) -> bool:
    """Whether a rank's part of theirs consists of its parts of ours."""
    if row.split == "replicated":
        return all(axis is None for axis in axes)
    wanted = 1 if row.split == "row" else 0
    # Of several parts of one piece, theirs is cut across; of q, k and v, each is cut.
    in_order = len(axes) == 1 or (row.split == "qkv" and all(len(part.chunks) == 1 for part in row.parts))
    return in_order and all(axis == wanted for axis in axes)


# Tensors


def without_shards(t: Tensor) -> Tensor:
    """This tensor rank's part of a parameter, or all of it, without what FSDP2 has made of it."""
    if not isinstance(t, DTensor):
        return t
    names = t.device_mesh.mesh_dim_names or ()
    kept = [p if name == "tensor" else Replicate() for name, p in zip(names, t.placements, strict=True)]
    with torch.no_grad():
        return local(t.redistribute(placements=kept))


def on_host(t: Tensor) -> Lazy:
    return lazy(t.detach().to("cpu", copy=True).contiguous())


def shape_of(t: Tensor) -> Lazy:
    """A tensor of which only shape and dtype matter."""
    return lazy(torch.empty(t.shape, dtype=t.dtype, device="meta"))


@torch.no_grad()
def copy_box(target: Tensor, source: Tensor, axis: int = 0, begin: int = 0) -> None:
    """Copy this rank's elements of ``target`` from ``source``, which holds those from ``begin`` on along ``axis``."""
    if isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        if 0 in shape:
            return
        starts = [o - begin * (dim == axis) for dim, o in enumerate(offset)]
        source = source[tuple(slice(o, o + n) for o, n in zip(starts, shape, strict=True))]
    local(target).copy_(source)
