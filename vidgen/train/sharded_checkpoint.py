# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run of many processes: each writes what it holds, in the background, and any layout reads them.

distributed/         tensors and their index, see vidgen.checkpoints.distributed
model.json           class and configuration of the model
optimizer.json       the optimizer's groups
model/, ema/         model folders, in the last checkpoint of a run
rng.safetensors, state.json, config.yaml, manifest.json    as in a checkpoint of one process

The folder of a run must be one that all processes see, such as a network file system.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidgen import device as devices
from vidgen import io
from vidgen.checkpoints.distributed import (
    FOLDER,
    MODEL,
    MODEL_FILE,
    OPTIMIZER,
    Distributed,
    Order,
    Pieces,
    describe_model,
    is_distributed,
    pieces_of,
    write_model_folder,
)
from vidgen.checkpoints.hf import PretrainedModel, load_state_dict, misfits
from vidgen.parallel.agree import all_true, together

from . import checkpoint, lora
from .optimizer import EMAAdamW

logger = logging.getLogger(__name__)

GROUPS_FILE = "optimizer.json"
MIN_TIMEOUT_S = 7200.0  # how long processes wait for the slowest disk among them
Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]  # for the background, for the processes themselves
Orders = Mapping[str, Order]  # by name of the parameter, see pieces_of and vidgen.parallel.tensor.row_order
OptimizerState = Mapping[str, Mapping[str, Tensor]]  # parts of the state by name of the parameter


class SaveFailed(OSError):
    """A checkpoint was not written, on any process."""


# What is written


def snapshot(model: nn.Module, optimizer: OptimizerState, orders: Orders | None = None) -> dict[str, Pieces]:
    """What this process writes, on the host; training may go on with the model.

    Args:
        model: its parameters and buffers are copied; DTensors, or tensors that every process has.
        optimizer: the state of its parameters, DTensors in the same places, copies that nobody changes.
        orders: of parameters that do not lie in their usual order in memory, see :func:`pieces_of`.
    """
    pieces = {name: _on_host(piece) for name, piece in _pieces(model, {}, orders).items()}
    return pieces | {name: p for name, p in _pieces(model, optimizer, orders).items() if name.startswith(OPTIMIZER)}


def _pieces(model: nn.Module, optimizer: OptimizerState, orders: Orders | None) -> dict[str, Pieces]:
    """The tensors of a run under the names that they have in a checkpoint, sharing their memory."""
    orders = orders or {}
    own = model.state_dict()
    pieces = {MODEL + name: pieces_of(t, orders.get(name)) for name, t in own.items()}
    for name, parts in optimizer.items():
        for part, t in parts.items():
            order = orders.get(name) if t.shape == own[name].shape else None  # a count of steps has no axes
            pieces[f"{OPTIMIZER}{name}/{part}"] = pieces_of(t, order)
    return pieces


def _on_host(pieces: Pieces) -> Pieces:
    boxes = tuple((start, box.to("cpu", copy=True).contiguous()) for start, box in pieces.boxes)
    return Pieces(pieces.shape, pieces.dtype, boxes)


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all processes."""

    step: int
    path: Path | None
    error: str | None


class Saver:
    """Writes the checkpoints of a run in the background, one at a time.

    All processes of the run make one together, and call its methods in the same order. What they exchange has groups
    of its own, so that it never mixes with the exchanges of training.

    Args:
        run: the folder of the run, which exists.
        keep: so many checkpoints are kept.
        groups: see :func:`own_groups`; None: this process alone.

    Raises:
        ValueError: a process does not see the folder as the first one does.
    """

    def __init__(self, run: str | Path, *, keep: int, groups: Groups | None) -> None:
        self.run, self.keep = Path(run), keep
        self.group = groups[0] if groups is not None else None
        self.control = groups[1] if groups is not None else None
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        check_shared(self.run, self.control)

    def start(
        self,
        step: int,
        pieces: Mapping[str, Pieces],
        fill: Callable[[Path], None],
        export: Callable[[Distributed, Path], None] | None = None,
    ) -> None:
        """Begin to write a checkpoint.

        Args:
            step: its number.
            pieces: of this process, see :func:`snapshot`.
            fill: writes the small files into the new folder, now and on the first process only.
            export: after everything is written, on the first process: writes model folders into the new folder.

        Raises:
            RuntimeError: the last one is not finished.
        """
        if self._thread is not None:
            raise RuntimeError("Saver.start: the last checkpoint is still being written; call wait first")

        def begun() -> None:
            if self.rank == 0:
                fill(checkpoint.begin(self.run, step))

        try:
            together(begun, self.group, SaveFailed)
        except SaveFailed as error:
            self._failed(step, error)
            self._thread = threading.Thread(target=lambda: None)
        else:
            self._thread = threading.Thread(
                target=self._write, args=(step, pieces, export), name="checkpoint", daemon=True
            )
        self._thread.start()

    def poll(self) -> Outcome | None:
        """At the end of a step: how the save ended if all processes are done with it, otherwise None."""
        if self._thread is None or not all_true(not self._thread.is_alive(), self.control):
            return None
        return self.wait()

    def wait(self) -> Outcome | None:
        """Wait for the save that is going on: how it ended, or None where there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._outcome

    # In the background

    def _write(
        self, step: int, pieces: Mapping[str, Pieces], export: Callable[[Distributed, Path], None] | None
    ) -> None:
        temporary = checkpoint.checkpoint_path(self.run, step).with_suffix(".tmp")
        try:
            write_pieces(temporary / FOLDER, pieces, self.group)
            entries = together(lambda: self._own_entries(temporary), self.group, SaveFailed)
            known = {name: entry for part in entries for name, entry in part.items()}
            paths = together(lambda: self._commit(step, temporary, known, export), self.group, SaveFailed)
            self._outcome = Outcome(step, paths[0], None)
        except BaseException as error:  # nobody above would hear of it
            self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> None:
        if self.rank == 0:
            checkpoint.abandon(self.run, step)
        self._outcome = Outcome(step, None, str(error) or type(error).__name__)

    def _own_entries(self, temporary: Path) -> dict[str, dict[str, Any]]:
        """What the manifest will say of the files that this process has written."""
        files = sorted((temporary / FOLDER).glob(f"__{self.rank}_*"))
        return {path.relative_to(temporary).as_posix(): io.file_entry(path) for path in files}

    def _commit(
        self,
        step: int,
        temporary: Path,
        known: dict[str, dict[str, Any]],
        export: Callable[[Distributed, Path], None] | None,
    ) -> Path | None:
        if self.rank != 0:
            return None
        written = Distributed.just_written(temporary)
        if lost := sorted(written.files() - known.keys()):
            raise FileNotFoundError(errno.ENOENT, "the process that wrote it does not find it", lost[0])
        if export is not None:
            export(written, temporary)
        return checkpoint.commit(self.run, step, known, keep=self.keep)


def write_pieces(folder: Path, pieces: Mapping[str, Pieces], group: dist.ProcessGroup | None) -> None:
    """Write the pieces of all processes of ``group``; what several of them have is written by one.

    Raises:
        SaveFailed: on all of them, where one failed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    # Nothing is to be copied ahead from a device: that would make this thread open the first one, on every process.
    writer = dcp.FileSystemWriter(folder, overwrite=False, per_thread_copy_ahead=0)
    try:
        dcp.save(
            dict(pieces),
            storage_writer=writer,
            planner=_planner(pieces),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:  # a BaseException, whose text is the tracebacks of all ranks
        failures = "; ".join(f"rank {rank}: {problem[0]!r}" for rank, problem in error.failures.items())
        raise SaveFailed(failures) from error


def _planner(pieces: Mapping[str, Pieces]) -> Any:
    from torch.distributed.checkpoint import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    boxes = {(name, start): box for name, piece in pieces.items() for start, box in piece.boxes}

    def item(name: str, start: tuple[int, ...], box: Tensor) -> WriteItem:
        offsets = torch.Size(start)
        chunk = ChunkStorageMetadata(offsets, box.size())
        written = TensorWriteData(chunk, TensorProperties(dtype=box.dtype), torch.Size(pieces[name].shape))
        return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=written)

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan([item(name, start, box) for (name, start), box in boxes.items()])
            return self.plan

        def lookup_object(self, index: MetadataIndex) -> Tensor:
            return boxes[index.fqn, tuple(index.offset or ())]

    return Planner(flatten_state_dict=False, flatten_sharded_tensors=False)


def write_small_files(folder: Path, model: PretrainedModel, groups: Sequence[Mapping[str, Any]]) -> None:
    """Write ``model.json`` and ``optimizer.json``; ``groups`` are the optimizer's, without parameters."""
    io.write_json(folder / MODEL_FILE, describe_model(model))
    io.write_json(folder / GROUPS_FILE, [{k: v for k, v in group.items() if k != "params"} for group in groups])


def export(source: Distributed, folder: Path, *, ema: bool, dtype: torch.dtype | None = None) -> None:
    """Write the model folder ``model`` into ``folder`` and, where an average is kept, ``ema`` beside it.

    Both are written tensor by tensor, so that memory holds one tensor at a time. ``dtype``: of floating-point tensors.
    """
    config = source.model_config()
    write_model_folder(folder / "model", source.weights(), config, dtype=dtype)
    if ema:
        write_model_folder(folder / "ema", source.weights(ema=True), config, dtype=dtype)


# What is read


def find(run: str | Path, resume: str, group: dist.ProcessGroup | None) -> Path | None:
    """See :func:`vidgen.train.checkpoint.find_checkpoint`; the processes of ``group`` share the work of verifying.

    ``group`` is one of CPU tensors. Raises ValueError on all processes.
    """
    if group is None:
        return checkpoint.find_checkpoint(run, resume)

    def verify(folder: Path) -> list[str]:
        part, parts = dist.get_rank(group), dist.get_world_size(group)
        found = together(lambda: io.verify_manifest(folder, part, parts), group)
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    listed = together(lambda: [str(path) for path in checkpoint.checkpoints(run)], group)[0]
    return checkpoint.find_checkpoint(run, resume, verify=verify, found=[Path(path) for path in listed])


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: OptimizerState,
    *,
    orders: Orders | None = None,
    names: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
    verified: bool = False,
) -> list[dict[str, Any]]:
    """Fill the model and the state of its optimizer from a checkpoint of one process or of many; the groups' options.

    Where the one has master copies of half-precision parameters and the other has float32 parameters, the first become
    the second. A parameter that the run never stepped gets moments of zero and is its own average.

    Args:
        folder: the checkpoint.
        model: its tensors are filled in place; DTensors or whole ones.
        optimizer: tensors of the same places, by name of the parameter, filled in place.
        orders: as in :func:`snapshot`.
        names: of the parameters of the whole model that are trained, in the order of the optimizer that one process
            would have; default: those of ``model``. Where ``model`` is a stage of a pipeline they must be given.
        group: of the processes that load together (CPU tensors), None: this one alone.
        verified: the manifest has been verified, as :func:`find` does.

    Raises:
        ValueError: on all processes: a checkpoint that is damaged, or of another model.
    """
    trained = names or [name for name, p in model.named_parameters() if p.requires_grad]
    source = open_any(Path(folder), trained, group, verified)
    return _load(source, model, optimizer, orders, group)


def load_one_process(folder: str | Path, model: nn.Module, optimizer: EMAAdamW, *, verified: bool = False) -> None:
    """Fill a model and its optimizer, both of one process, from a checkpoint of one process or of many, see `load`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    source = open_any(Path(folder), list(parameters), None, verified)
    for name, p in parameters.items():
        if f"{OPTIMIZER}{name}/step" in source.shapes and not optimizer.state.get(p):
            optimizer._start(p)
    groups = _load(source, model, state_by_name(model, optimizer), None, None)
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"{folder}: its optimizer has {len(groups)} groups, wanted {len(optimizer.param_groups)}")
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)


def _load(
    source: Distributed | OneProcess,
    model: nn.Module,
    optimizer: OptimizerState,
    orders: Orders | None,
    group: dist.ProcessGroup | None,
) -> list[dict[str, Any]]:
    pieces = _pieces(model, optimizer, orders)
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    everywhere = {name: shape for part in together(lambda: own, group) for name, shape in part.items()}
    stored = {name.removeprefix(MODEL): shape for name, shape in source.shapes.items() if name.startswith(MODEL)}
    if problems := misfits(_empty(everywhere), _empty(stored)):
        raise ValueError(f"{source.folder} is of another model\n" + "\n".join(problems))
    together(lambda: _fill(source, pieces), group)
    groups = io.read_json(source.folder / GROUPS_FILE)
    return [{k: tuple(v) if k == "betas" else v for k, v in each.items() if k != "params"} for each in groups]


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def open_any(
    folder: Path, names: Sequence[str], group: dist.ProcessGroup | None, verified: bool
) -> Distributed | OneProcess:
    """Open a checkpoint of either kind; the processes of ``group`` share the work of verifying."""
    part, parts = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if not verified:
        found = together(lambda: io.verify_manifest(folder, part, parts), group)
        if problems := list(dict.fromkeys(problem for problems in found for problem in problems)):
            raise ValueError(f"{folder}: {'; '.join(problems[:10])}")
    opened: list[Distributed | OneProcess] = []

    def open_it() -> None:
        opened.append(Distributed(folder, verified=True) if is_distributed(folder) else OneProcess(folder, names))

    together(open_it, group)
    return opened[0]


@torch.no_grad()
def _fill(source: Distributed | OneProcess, pieces: Mapping[str, Pieces]) -> None:
    """Read every tensor of ``pieces`` from where it lies, or from what takes its place."""
    targets: dict[str, dict[str, Pieces]] = {}  # by name in the checkpoint; a name may serve two
    for name, target in pieces.items():
        place: str | None = name
        parameter, _, part = name.removeprefix(OPTIMIZER).rpartition("/")
        if name.startswith(MODEL):
            parameter = name.removeprefix(MODEL)
            master, has_own = f"{OPTIMIZER}{parameter}/master", f"{OPTIMIZER}{parameter}/master" in pieces
            place = master if master in source.shapes and not has_own else name
        elif name not in source.shapes:
            stepped = f"{OPTIMIZER}{parameter}/step" in source.shapes
            if part == "master" or (part == "ema" and not stepped):
                place = MODEL + parameter
            elif stepped:
                raise ValueError(f"{source.folder} lacks {name}")
            else:
                place = None
        if place is None:
            for _, box in target.boxes:
                box.zero_()
            continue
        if source.shapes[place] != target.shape:
            raise ValueError(f"{source.folder}: {place} must be {target.shape}, got {source.shapes[place]}")
        targets.setdefault(place, {})[name] = target
    while targets:
        source.read({place: users.pop(next(iter(users))) for place, users in targets.items()})
        targets = {place: users for place, users in targets.items() if users}


class OneProcess:
    """The tensors of a checkpoint of one process (vidgen.train.checkpoint) under the names that `Distributed` has.

    Raises ValueError where its optimizer is not one of the parameters ``names``.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        from safetensors.torch import load_file

        self.folder = folder
        self.tensors = {MODEL + name: t for name, t in self._weights(names).items()}
        groups = io.read_json(folder / GROUPS_FILE)
        indices = [index for group in groups for index in group["params"]]
        if len(indices) != len(names):
            raise ValueError(f"{folder}: its optimizer has {len(indices)} parameters, wanted {len(names)}")
        by_index = dict(zip(indices, names, strict=True))
        for key, t in load_file(folder / "optimizer.safetensors").items():
            index, _, part = key.partition(".")
            self.tensors[f"{OPTIMIZER}{by_index[int(index)]}/{part}"] = t
        self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}

    def _weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Of the model, or of the adapters ``names`` under the names that they have in it."""
        file = self.folder / "model" / lora.FILE
        if not file.is_file():
            return load_state_dict(self.folder / "model")
        ours = {lora.file_name(name): name for name in names}
        return {ours.get(name, name): t for name, t in load_state_dict(file).items()}

    def read(self, targets: Mapping[str, Pieces]) -> None:
        for name, pieces in targets.items():
            whole = self.tensors[name]
            for start, box in pieces.boxes:
                box.copy_(whole[tuple(slice(a, a + n) for a, n in zip(start, box.shape, strict=True))])


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state that an optimizer of one process has, by name of the parameter."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: optimizer.state[p] for group in optimizer.param_groups for p in group["params"]}


# Processes


def own_groups(timeout_s: float = MIN_TIMEOUT_S, ranks: Sequence[int] | None = None) -> Groups:
    """Two new groups for a :class:`Saver`, of CPU tensors: of all processes, or of some. All processes call this.

    ``timeout_s``: how long processes wait for each other; the slowest disk should not take longer.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = devices.communication_backend(torch.device("cpu"))
    background, control = (dist.new_group(ranks, timeout, backend) for _ in range(2))
    return background, control


def check_shared(folder: Path, group: dist.ProcessGroup | None, patience_s: float = 5.0) -> None:
    """Raise ValueError on all processes where one does not see in ``folder`` what the first one writes there."""
    if group is None:
        return
    token = together(lambda: secrets.token_hex(8), group)[0]
    file = folder / f".shared.{token}"

    def look() -> None:
        if dist.get_rank(group) == 0:
            file.touch()
        give_up = time.monotonic() + patience_s  # network file systems may show it a little later
        while not file.exists():
            if time.monotonic() > give_up:
                raise ValueError(f"output: {folder} must be a folder that all processes share")
            time.sleep(0.05)

    with contextlib.ExitStack() as cleanup:
        if dist.get_rank(group) == 0:
            cleanup.callback(file.unlink, missing_ok=True)
        together(look, group)
