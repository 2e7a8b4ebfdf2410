# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of several processes: written on one layout, read on another, compared bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from attention_cases import GROUPS, Group
from combination_cases import SIZES, Drawn, recipe_of
from tiny import make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from trainer_cases import losses, on_rank_0

from vidgen import io
from vidgen.checkpoints import distributed
from vidgen.checkpoints.hf import PretrainedModel, load_state_dict
from vidgen.parallel import Layout, Parallel
from vidgen.parallel.layout import DIMS
from vidgen.parallel.sharding import shard_model
from vidgen.train import checkpoint, loop, sharded_checkpoint
from vidgen.train.optimizer import EMAAdamW
from vidgen.train.sharded_checkpoint import Saver
from vidgen.train.sharded_optimizer import ShardedEMAAdamW

OPTIONS = {"lr": 0.1, "ema_decay": 0.9}
FUSED = torch.tensor([0, 1, 5, 6, 2, 3, 4, 7, 8, 9])  # an order in memory, as of two matrices that are cut each
STEP = 7
SAVING: dict[int, sharded_checkpoint.Groups] = {}  # by the number of ranks


@dataclasses.dataclass
class ToyConfig:
    width: int = 6


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        self.norm = nn.LayerNorm(width)


class Stage(nn.ModuleDict):
    """Some blocks under the numbers that they have in the whole model."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values())


class Toy(PretrainedModel):
    """Sizes that nothing divides, a buffer, and a parameter that is not trained."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(3, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0))


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(seed)
    model = Toy(ToyConfig())
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.copy_(torch.randn(t.shape))
    return model.to(dtype)


def trained(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Toy, EMAAdamW]:
    """A model of one process and its optimizer after three steps; one parameter never had a gradient."""
    model = toy(seed, dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = EMAAdamW(parameters, **OPTIONS)
    for _ in range(3):
        for p in parameters[1:]:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    return model, optimizer


def save_alone(folder: Path, model: Toy, optimizer: EMAAdamW) -> Path:
    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary / "model")
        checkpoint.save_optimizer(optimizer, temporary)
        checkpoint.save_state(temporary, {"step": STEP}, torch.device("cpu"))

    return checkpoint.save_checkpoint(folder, STEP, fill, keep=3)


def whole_tensors(model: Toy, optimizer: Any, orders: dict[str, Any]) -> dict[str, Tensor]:
    """All that a checkpoint holds, whole and with rows in their order, on every rank of the layout."""
    state = {f"model/{name}": t for name, t in model.state_dict().items()}
    for name, parts in optimizer.items():
        state |= {f"optimizer/{name}/{part}": t for part, t in parts.items()}
    result = {}
    for name, t in state.items():
        t = t.full_tensor() if isinstance(t, DTensor) else t.detach().clone()
        order = orders.get(name.split("/")[1])
        if order is not None and t.dim():
            t = torch.empty_like(t).index_copy_(order[0], order[1], t)
        result[name] = t
    return result


class Run:
    """A model on a layout. Its weights and moments are others than those of `trained` until something is loaded."""

    def __init__(self, layout: Any, *, stage: int | None = None, permuted: bool = False) -> None:
        self.layout, self.orders = layout, {}
        self.model = toy(seed=99)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        if stage is not None:  # of a pipeline: the first has the entry, the second the rest
            blocks = dict(enumerate(self.model.blocks))
            self.model.blocks = Stage({str(i): b for i, b in blocks.items() if (i < 1) == (stage == 0)})
            if stage == 1:
                del self.model.embed
        if layout.size("tensor") > 1:
            self.cut(permuted)
        if not isinstance(layout, Few) or layout.size("tensor") == 1:
            shard_model(self.model, layout)
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = ShardedEMAAdamW(trainable, layout, **OPTIONS)
        self.group = layout.group("world")

    def cut(self, permuted: bool) -> None:
        mesh = self.layout.mesh["tensor"]
        for name, block in self.model.blocks.named_children():
            for module, parameter, axis in ((block.up, "weight", 0), (block.up, "bias", 0), (block.down, "weight", 1)):
                value = getattr(module, parameter).detach()
                setattr(module, parameter, nn.Parameter(distribute_tensor(value, mesh, [Shard(axis)])))
            if permuted:
                self.orders |= {f"blocks.{name}.up.{part}": (0, FUSED) for part in ("weight", "bias")}
                self.orders[f"blocks.{name}.down.weight"] = 1, FUSED

    def load(self, folder: Path, **options: Any) -> None:
        state = self.optimizer.full_state("cpu")
        groups = sharded_checkpoint.load(
            folder, self.model, state, orders=self.orders, names=self.names, group=self.group, **options
        )
        self.optimizer.load_full_state(state)
        self.optimizer.load_group_options(groups)

    def whole(self) -> dict[str, Tensor]:
        return whole_tensors(self.model, self.optimizer.full_state(), self.orders)

    def saver(self, folder: Path, keep: int = 3) -> Saver:
        return Saver(folder, keep=keep, groups=SAVING[dist.get_world_size(self.group)])

    def start(self, saver: Saver, step: int = STEP, **options: Any) -> None:
        def fill(folder: Path) -> None:
            sharded_checkpoint.write_small_files(folder, self.model, self.optimizer.param_groups)
            checkpoint.save_state(folder, {"step": step}, torch.device("cpu"))

        pieces = sharded_checkpoint.snapshot(self.model, self.optimizer.full_state("cpu"), self.orders)
        saver.start(step, pieces, fill, **options)

    def save(self, folder: Path, step: int = STEP, **options: Any) -> Path:
        saver = self.saver(folder)
        self.start(saver, step, **options)
        outcome = saver.wait()
        assert outcome is not None and outcome.path is not None, outcome
        return outcome.path


class Few:
    """As much of a layout as is needed here, of fewer processes than there are: they lie along one dimension."""

    def __init__(self, ranks: int, dim: str) -> None:
        world, one = GROUPS[tuple(range(ranks))], GROUPS[dist.get_rank(),]
        alone = DeviceMesh.from_group(one, "cpu", mesh_dim_names=("alone",))
        self.mesh = dict.fromkeys(DIMS, alone) | {
            dim: DeviceMesh.from_group(world, "cpu", mesh_dim_names=(dim,)),
            "world": DeviceMesh.from_group(world, "cpu", mesh_dim_names=("world",)),
        }
        self.sizes = {name: self.size(name) for name in DIMS}
        self.fsdp_mesh = self.mesh["shard"]

    def size(self, dim: str) -> int:
        return int(self.mesh[dim].size())

    def rank(self, dim: str) -> int:
        return int(self.mesh[dim].get_local_rank())

    def group(self, dim: str) -> Group:
        return self.mesh[dim].get_group()


def layout_of(ranks: int, **sizes: Any) -> Any:
    """Called by all processes."""
    if ranks not in SAVING:
        SAVING[ranks] = sharded_checkpoint.own_groups(60, range(ranks))
    if ranks == dist.get_world_size():
        return Layout.create(Parallel(**sizes))
    ((dim, _),) = sizes.items()
    return Few(ranks, dim) if dist.get_rank() < ranks else None


def folder_of(group: Group, name: str) -> Path:
    """A folder that all ranks see, made by one."""
    if dist.get_rank(group) == 0:
        Path(name).mkdir(parents=True)
    dist.barrier(group)
    return Path(name)


def differences(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bits."""
    return [name for name, t in wanted.items() if name in got and not torch.equal(got[name], t)]


HOPS: dict[str, Any] = {
    "fsdp 4": (4, {"shard": 4}, {}),
    "tp 2": (2, {"tensor": 2}, {"permuted": True}),
    "fsdp 3": (3, {"shard": 3}, {}),
    "tp 2 x fsdp 2": (4, {"tensor": 2}, {"permuted": True}),
    "hsdp 2 x 2": (4, {"replicate": 2, "shard": 2}, {}),
    "pipeline 2 x fsdp 2": (4, {"pipeline": 2}, {"stage": True}),
}


def hops(group: Group, folder: str) -> dict[str, list[str]]:
    """From one process over every layout and back to one; by hop, the tensors that are not what they were."""
    rank, found = dist.get_rank(group), {}
    model, optimizer = trained()
    truth = whole_tensors(model, sharded_checkpoint.state_by_name(model, optimizer), {})
    for name in ("exp_avg", "exp_avg_sq", "step"):  # the parameter that was never stepped
        truth[f"optimizer/embed.weight/{name}"] = torch.zeros(() if name == "step" else (6, 3))
    truth["optimizer/embed.weight/ema"] = truth["model/embed.weight"]
    root, place = folder_of(group, folder), ""
    if rank == 0:
        place = str(save_alone(root / "alone", model, optimizer))
    for number, (name, (ranks, sizes, options)) in enumerate(HOPS.items()):
        layout = layout_of(ranks, **sizes)
        box = [place]
        dist.broadcast_object_list(box, 0, group=group)
        if rank < ranks:
            if "stage" in options:
                options = {"stage": layout.rank("pipeline")}
            run = Run(layout, **options)
            run.load(Path(box[0]))
            whole = run.whole()
            found[name] = differences(whole, truth)
            assert run.optimizer.param_groups[0]["num_steps"] == 3
            assert run.optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
            if ranks == dist.get_world_size(run.group) and "stage" not in options:
                assert whole.keys() == truth.keys(), whole.keys() ^ truth.keys()
            place = str(run.save(folder_of(run.group, f"{folder}/{number}")))
        dist.barrier(group)
    if rank == 0:
        found["one process"] = back_to_one(Path(place), truth)
    return found


def back_to_one(folder: Path, truth: dict[str, Tensor]) -> list[str]:
    model = toy(seed=99)
    optimizer = EMAAdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, ema_decay=0.9)
    sharded_checkpoint.load_one_process(folder, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"] and optimizer.param_groups[0]["num_steps"] == 3
    got = whole_tensors(model, sharded_checkpoint.state_by_name(model, optimizer), {})
    assert got.keys() == truth.keys(), got.keys() ^ truth.keys()
    return differences(got, truth)


def asynchronous(group: Group, folder: str) -> dict[str, Any]:
    """A save is of the moment it began at, whatever happens to the model while it is written; ``keep`` is kept."""
    root, run = folder_of(group, folder), Run(layout_of(4, replicate=2, shard=2))
    written, write = [], sharded_checkpoint.write_pieces
    saver, wait = run.saver(root, keep=1), threading.Event()

    def slow(*args: Any) -> None:
        assert wait.wait(30)
        write(*args)

    found: dict[str, Any] = {}
    run.save(root, step=1)
    before = run.whole()
    with mock.patch.object(sharded_checkpoint, "write_pieces", slow):
        run.start(saver, step=2)
        found["while it waits"] = saver.poll(), sorted(p.name for p in root.glob("step_*"))
        with torch.no_grad():
            for p in run.model.parameters():
                p.zero_()
        for parts in run.optimizer.optimizer.state.values():
            parts["exp_avg"].fill_(-1)
        try:
            run.start(saver, step=3)
        except RuntimeError as error:
            found["second"] = str(error)
        wait.set()
        while (outcome := saver.poll()) is None:
            written.append(outcome)
    found["outcome"] = outcome.step, outcome.path.name, outcome.error, saver.poll(), saver.wait()
    found["left"] = sorted(p.name for p in root.iterdir())
    run.load(root / "step_00000002")
    found["differs"] = differences(run.whole(), before)
    return found


def failures(group: Group, folder: str, what: str) -> dict[str, Any]:
    """One rank cannot write: the save fails on all of them, the older checkpoint stays, and the next save is good."""
    root, run = folder_of(group, folder), Run(layout_of(4, shard=4))
    run.save(root, step=1)
    rank, full = dist.get_rank(group), OSError(28, "No space left on device")
    targets = {
        "data": ("torch.distributed.checkpoint.FileSystemWriter.write_data", 2),
        "hash": ("vidgen.io.file_entry", 3),
        "begin": ("vidgen.train.checkpoint.begin", 0),
        "commit": ("vidgen.train.checkpoint.commit", 0),
        "lost file": ("vidgen.train.sharded_checkpoint.write_pieces", 0),
    }
    name, culprit = targets[what]

    def losing(folder: Path, *args: Any) -> None:
        sharded_write(folder, *args)
        (folder / "__1_0.distcp").unlink()

    sharded_write, side_effect = sharded_checkpoint.write_pieces, losing if what == "lost file" else full
    saver = run.saver(root)
    with mock.patch(name, side_effect=side_effect) if rank == culprit else contextlib.nullcontext():
        run.start(saver, step=2)
        outcome = saver.wait()
    dist.barrier(group)  # the first rank has cleared away what was left
    found = {"failed": (outcome.path, outcome.error), "left": sorted(p.name for p in root.iterdir())}
    found["found"] = sharded_checkpoint.find(root, "auto", group).name
    run.start(saver, step=3)
    found["next"] = saver.wait().path.name
    return found


def refusals(group: Group, folder: str, what: str) -> list[str]:
    """With which words a checkpoint is refused on each rank, and whether its index was opened before."""
    root, run = folder_of(group, folder), Run(layout_of(4, shard=4))
    path, rank = run.save(root), dist.get_rank(group)
    opened: list[Any] = []
    if rank == 0:
        spoil(path, what)
    dist.barrier(group)
    resume = str(path) if what == "by path" else "auto"
    if what == "other model":
        run.model = shard_model(Toy(ToyConfig(width=8)), run.layout)
    read = distributed.read_index
    with mock.patch.object(distributed, "read_index", lambda file: (opened.append(file), read(file))[1]):
        told = []
        for attempt in (
            lambda: sharded_checkpoint.find(root, resume, group),
            lambda: run.load(path),
        ):
            try:
                told.append(str(attempt()))
            except ValueError as error:
                told.append(str(error))
    return [*told, f"opened {len(opened)}"]


def spoil(path: Path, what: str) -> None:
    """Damage a checkpoint; or, with a manifest that fits, put something else in its place."""
    if what in ("data", "by path"):
        file = path / "distributed" / "__2_0.distcp"
        content = bytearray(file.read_bytes())
        content[-200] ^= 1
        file.write_bytes(content)
    elif what == "index":
        (path / "distributed" / ".metadata").write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
    elif what == "manifest":
        (path / "manifest.json").unlink()
    elif what == "unlisted index":
        manifest = io.read_json(path / "manifest.json")
        del manifest["files"]["distributed/.metadata"]
        io.write_json(path / "manifest.json", manifest)
    elif what == "foreign pickle":
        (path / "distributed" / ".metadata").write_bytes(b"cos\nsystem\n(S'exit 9'\ntR.")
        io.write_manifest(path)


def exported(group: Group, folder: str) -> list[str]:
    """A save of a pipeline with model folders beside it, the weights in half precision."""
    layout = layout_of(4, pipeline=2)
    root, run = folder_of(group, folder), Run(layout, stage=layout.rank("pipeline"))
    seed_average(run)
    export = functools.partial(sharded_checkpoint.export, ema=True, dtype=torch.bfloat16)
    run.save(root, export=lambda source, to: export(source, to))
    return sorted(p.relative_to(root / "step_00000007").as_posix() for p in (root / "step_00000007").rglob("*.*"))


def seed_average(run: Run) -> None:
    """Make every average its parameter plus one."""
    for name, p in run.optimizer.slices.items():
        run.optimizer.optimizer.state[p]["ema"].copy_(run.optimizer._slice(run.optimizer.parameters[name]) + 1)


def from_half_precision(group: Group, folder: str) -> list[str]:
    """One process in bfloat16 with float32 master copies, then many in float32: the copies are the weights."""
    model, optimizer = trained(dtype=torch.bfloat16)
    root, run = folder_of(group, folder), Run(layout_of(4, shard=4))
    if dist.get_rank(group) == 0:
        save_alone(root, model, optimizer)
    dist.barrier(group)
    run.load(checkpoint.checkpoint_path(root, STEP))
    names = {p: name for name, p in model.named_parameters()}
    truth = {}
    for p in optimizer.param_groups[0]["params"]:
        state = optimizer.state[p]
        truth[f"model/{names[p]}"] = state.get("master", p.detach().float())
        truth |= {f"optimizer/{names[p]}/{part}": t for part, t in state.items() if part != "master"}
    wrong = differences(run.whole(), truth)
    path = run.save(folder_of(group, folder + "/next"))
    if dist.get_rank(group) == 0:  # and back to one process in bfloat16
        again = toy(seed=99, dtype=torch.bfloat16)
        other = EMAAdamW([p for p in again.parameters() if p.requires_grad], **OPTIONS)
        sharded_checkpoint.load_one_process(path, again, other)
        got, wanted = (sharded_checkpoint.state_by_name(*pair) for pair in ((again, other), (model, optimizer)))
        for name, parts in wanted.items():
            wrong += [f"{name}/{part}" for part, t in parts.items() if not torch.equal(got[name][part], t)]
        wrong += differences(dict(again.named_parameters()), dict(model.named_parameters()))
    return wrong


def not_shared(group: Group, folder: str) -> str:
    """One rank has another disk."""
    rank = dist.get_rank(group)
    root = folder_of(group, folder)
    own = root if rank != 3 else folder_of(GROUPS[rank,], folder + ".other")
    layout_of(4, shard=4)
    try:
        sharded_checkpoint.check_shared(own, group, patience_s=0.2)
    except ValueError as error:
        return str(error).replace(str(root), "ROOT")
    return "no error"


# What runs in turn, each with one step more: of a step's four micro-steps, ``accumulation`` are a replica's.
LEGS: list[tuple[dict[str, Any] | None, int]] = [
    (None, 4),
    ({"shard": 4}, 1),
    ({"tensor": 2}, 2),
    ({"pipeline": 2}, 2),
    (None, 4),
]


@mock.patch.object(loop, "build_task", Drawn)
def resumed(group: Group, folder: Path, system: str) -> dict[str, float]:
    """Runs of the trainer that go on from each other's checkpoints on other layouts, against one that does not stop."""
    on_rank_0(lambda: make_model(system, **SIZES[system]).save_pretrained(folder / "weights"))

    def recipe(output: str, steps: int, accumulation: int) -> Any:
        made = recipe_of(system, folder, output, accumulation)
        made.training.steps = steps
        made.vae = made.text.t5 = made.text.clip = folder / "nowhere"  # a recipe that is read again names them
        made.data.height = made.data.width = 64
        return made

    for number, (parallel, accumulation) in enumerate(LEGS):
        leg = recipe("legs", number + 1, accumulation)
        if parallel is None:
            assert on_rank_0(functools.partial(loop.train, leg))["step"] == number + 1
        else:
            leg.parallel = Parallel(**parallel)
            assert loop.train(leg, layout=Layout.create(leg.parallel))["step"] == number + 1

    def alone() -> dict[str, float]:
        loop.train(recipe("one", len(LEGS), 4))
        runs = [folder / name for name in ("legs", "one")]
        found = {"loss": max(abs(a - b) for a, b in zip(*map(losses, runs), strict=True))}
        last = f"step_{len(LEGS):08d}"
        for part in ("model", "ema"):
            states = [load_state_dict(run / last / part) for run in runs]
            found[part] = max(float((states[0][name] - t).abs().max()) for name, t in states[1].items())
        return found

    found: dict[str, float] = on_rank_0(alone)
    return found
