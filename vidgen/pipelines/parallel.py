# SPDX-License-Identifier: Apache-2.0
"""Sampling over processes: prompts, predictions of the guidance, tokens and weights, each over ranks of their own.

The number of a process grows fastest along ``tensor``, then ``ulysses``, ``ring``, ``guidance`` and at last along the
prompts, which take what the others leave. The processes of one video hold the same latents and draw the same noise, so
that nothing but the transformer's inside and its predictions are exchanged while it is sampled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from vidgen import device as devices
from vidgen.checkpoints.hf import read_config
from vidgen.ops.context_parallel import shard_sizes
from vidgen.ops.context_parallel.exchange import gather
from vidgen.parallel import Parallel, context
from vidgen.parallel.layout import flat
from vidgen.parallel.sharding import fill, shard_model, tensors_of
from vidgen.parallel.tensor import row_order, tensor_parallel, tensor_problems
from vidgen.parallel.vae import parallel_decode_stream
from vidgen.train.ranks import Ranks, join, tried, world_size

from .settings import Job


@dataclass(frozen=True)
class Spread:
    """How sampling is spread over processes.

    Attributes:
        ulysses, ring, tensor: as in `vidgen.parallel.Parallel`: processes that share the tokens of a video.
        skiparse: as in `vidgen.parallel.Parallel`.
        guidance: processes that share the predictions which guidance needs at once: with and without the prompt.
        shard: each process keeps a part of the transformer's weights, and gathers a block when it computes it.
        offload: the parts lie on the host.
    """

    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    skiparse: context.Skiparse = "heads"
    guidance: int = 1
    shard: bool = False
    offload: bool = False

    def prompts(self, world: int) -> int:
        """Processes, or groups of them, that take different prompts.

        Raises:
            ValueError: the sizes do not fit so many processes.
        """
        sizes = {name: getattr(self, name) for name in ("ulysses", "ring", "tensor", "guidance")}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"sample: {name} must be positive, got {size}")
        if self.offload and not self.shard:
            raise ValueError("sample: offload must go with shard, got shard=False")
        of_video = self.video
        if world % of_video:
            told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            nearest = of_video * max(1, round(world / of_video))
            raise ValueError(
                f"sample: {told} needs a multiple of {of_video} processes, got {world}; nearest: {nearest}"
            )
        return world // of_video

    @property
    def video(self) -> int:
        """Processes that work on one video."""
        return self.ulysses * self.ring * self.tensor * self.guidance

    def parallel(self, world: int) -> Parallel:
        """The layout: weights are sharded over all ranks, or not at all."""
        prompts = self.prompts(world)
        return Parallel(
            shard=prompts * self.guidance if self.shard else self.guidance,
            replicate=1 if self.shard else prompts,
            ulysses=self.ulysses,
            ring=self.ring,
            tensor=self.tensor,
            skiparse=self.skiparse,
        )


class Crew:
    """The processes of a run and the place of this one.

    Attributes:
        everyone: all of them.
        video: those that work on the same video; the first one reads, encodes and writes for it.
        lockstep: those that must call the transformer equally often.
        spread: how they share the work.
        prompt, prompts: number of this process's videos' group, and how many there are.
        guidance: those that share the predictions of one video and hold the same tokens; None alone.
        failed: whether one of the lockstep has, and all know.
    """

    def __init__(self, ranks: Ranks | None = None, spread: Spread | None = None) -> None:
        self.everyone, self.spread = ranks or Ranks(), spread or Spread()
        self.video = self.lockstep = self.everyone
        self.prompt, self.prompts, self.guidance = 0, 1, None
        self.failed = False
        layout = self.everyone.layout
        if layout is None:
            return
        self.prompts = self.spread.prompts(self.everyone.size)
        sizes = (self.prompts, self.spread.guidance, self.spread.video // self.spread.guidance)
        numbers = torch.tensor(self.everyone.gather(dist.get_rank())).view(sizes)
        mesh = DeviceMesh(layout.mesh.device_type, numbers, mesh_dim_names=("prompts", "guidance", "tokens"))
        self.prompt, self.guidance = int(mesh.get_local_rank("prompts")), mesh.get_group("guidance")
        self.video = self.everyone.within(flat(mesh, ("guidance", "tokens"), "video").get_group())
        self.lockstep = self.everyone if self.spread.shard else self.video

    @property
    def video_group(self) -> dist.ProcessGroup | None:
        """For collectives over the ranks of a video; None where there is one."""
        return self.video.group if self.video.size > 1 else None

    def own(self, count: int) -> list[int]:
        """Which of so many requests are this process's."""
        sizes = shard_sizes(count, self.prompts)
        start = sum(sizes[: self.prompt])
        return list(range(start, start + sizes[self.prompt]))

    def rounds(self, batches: list[list[int]]) -> list[tuple[list[int], bool]]:
        """The batches in which the transformer is called, and whether the result counts.

        Who has fewer than the others of its lockstep repeats its last one.
        """
        missing = max(self.lockstep.gather(len(batches))) - len(batches)
        return [(batch, True) for batch in batches] + [(batch, False) for batch in batches[-1:] * missing]


@contextlib.contextmanager
def crew_of(spread: Spread | None, device_name: str) -> Iterator[tuple[Crew, torch.device]]:
    """The processes of a run and this process's device; without ``spread``, this process alone.

    Raises:
        ValueError: the sizes do not fit the number of processes, or no such device is here.
    """
    if spread is None:
        yield Crew(), devices.resolve(device_name)
        return
    world = dist.get_world_size() if dist.is_initialized() else world_size()
    with join(spread.parallel(world), device_name) as (ranks, device):
        yield Crew(ranks, spread), device


# The transformer


def load_transformer(system: Any, job: Job, crew: Crew, kinds: Sequence[str]) -> Any:
    """The transformer as samplers call it, for videos of these kinds; all processes of the crew call this together,
    also those that have no video.

    The predictions that guidance needs at once are shared where there are enough for each process, see
    :func:`guidance_problems`; otherwise each makes all of them.
    """
    layout, spread = crew.everyone.layout, crew.spread
    if layout is None:
        return system.load_transformer(job.parts, job.dtype, job.device)
    if spread.shard or spread.tensor > 1:
        transformer: Any = load_parts(system, job, crew)
    else:
        transformer = crew.everyone.together(
            lambda: system.load_transformer(job.parts, job.dtype, job.device) if kinds else None
        )
    if transformer is None:
        return None
    context.spread(transformer, layout, spread.skiparse)
    return Transformer(
        transformer,
        crew,
        split=not guidance_problems(system, job, crew, kinds),
        shared=getattr(system, "SHARED_ARGUMENTS", ()),
    )


def guidance_problems(system: Any, job: Job, crew: Crew, kinds: Sequence[str]) -> list[str]:
    """Why the predictions of videos of these kinds cannot be shared as the crew wants; empty if they can."""
    wanted = crew.spread.guidance
    least = min((system.predictions(job, kind) for kind in kinds), default=wanted)
    if wanted <= least:
        return []
    what = f"{least} predictions" if least > 1 else "one prediction"
    return [f"guidance-parallel must be at most {least}, as a step of these videos needs {what}, got {wanted}"]


def problems(system: Any, job: Job, crew: Crew, kinds: Sequence[str]) -> list[str]:
    """Why videos of these kinds cannot be shared as the crew wants, in words; empty if they can."""
    found, layout = guidance_problems(system, job, crew, kinds), crew.everyone.layout
    if layout is None:
        return found
    model = unfilled(system, job)
    found += tensor_problems(model, crew.spread.tensor)
    try:
        context.spread(model, layout, crew.spread.skiparse)
    except ValueError as error:
        found.append(str(error))
    return found


def unfilled(system: Any, job: Job) -> nn.Module:
    """The transformer on the meta device."""
    cls = system.transformer_class(job.parts)
    with torch.device("meta"):
        model: nn.Module = cls(read_config(cls, job.parts.transformer))
    return model.to(job.dtype).requires_grad_(False).eval()


def load_parts(system: Any, job: Job, crew: Crew) -> nn.Module:
    """This process's part of the transformer's weights. Only the first process reads them, into its host's memory, and
    sends them tensor by tensor."""
    layout, ranks = crew.everyone.layout, crew.everyone
    assert layout is not None
    model = unfilled(system, job)
    templates = {name: t.detach() for name, t in tensors_of(model).items()}
    tensor_parallel(model, layout)
    if crew.spread.shard:
        shard_model(model, layout, param_dtype=job.dtype, cpu_offload=crew.spread.offload)
    model.to_empty(device="cpu" if crew.spread.offload else job.device)
    host = torch.device("cpu")
    whole = ranks.together(lambda: system.load_transformer(job.parts, job.dtype, host) if ranks.is_first else None)
    fill(model, None if whole is None else tensors_of(whole), templates, layout, row_order(model))
    return model


class Transformer:
    """A transformer of many processes, called with a whole batch and returning one.

    Each of the ranks of the guidance group computes some samples of the batch. Before a call the ranks make sure that
    none of them has failed.

    Args:
        split: False: each of them computes all samples.
        shared: names of arguments that belong to all samples and so have no batch axis.
    """

    def __init__(self, model: Any, crew: Crew, *, split: bool = True, shared: Sequence[str] = ()) -> None:
        self.model, self.crew, self.split, self.shared = model, crew, split, tuple(shared)
        self.config = getattr(model, "config", None)

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        together(self.crew)
        group = self.crew.guidance
        if group is None or self.crew.spread.guidance == 1 or not self.split:
            return self.model(*arguments, **named)  # type: ignore[no-any-return]
        values: dict[str | int, Any] = dict(enumerate(arguments)) | named  # type: ignore[operator]
        batch = next(len(v) for name, v in values.items() if isinstance(v, Tensor) and name not in self.shared)
        sizes, rank = shard_sizes(batch, self.crew.spread.guidance), dist.get_rank(group)
        if min(sizes) == 0:
            raise ValueError(f"guidance: the batch must have at least {len(sizes)} samples, got {batch}")
        begin = sum(sizes[:rank])
        part = {name: self._part(name, value, batch, begin, sizes[rank]) for name, value in values.items()}
        output = self.model(*(part[i] for i in range(len(arguments))), **{name: part[name] for name in named})
        return gather(output, 0, sizes, group)

    def _part(self, name: str | int, value: Any, batch: int, begin: int, size: int) -> Any:
        if not isinstance(value, Tensor) or name in self.shared:
            return value
        if value.shape[:1] != (batch,):
            raise ValueError(
                f"guidance: argument {name} must have the batch {batch} in front, got {tuple(value.shape)}"
            )
        return value[begin : begin + size]


def together(crew: Crew, error: Exception | None = None) -> None:
    """Raise on all processes of the lockstep what one of them has met; each calls this equally often."""
    (crew.failed,) = crew.lockstep.any(error is not None)
    if crew.failed:
        crew.lockstep.raise_together(error)


def in_lockstep(crew: Crew, function: Callable[[], Any]) -> Any:
    """``function()``, in which the transformer is called; where it raises on one process, all raise."""

    def guarded() -> Any:
        result, error = tried(function)
        if not crew.failed:
            together(crew, error)
        if error is not None:
            raise error
        return result

    return crew.everyone.together(guarded)


# The VAE


def decode_stream(vae: Any, latent: Tensor, group: dist.ProcessGroup | None, **options: Any) -> Iterator[Tensor]:
    """``vae.decode_stream``, by all ranks of ``group`` where there is one: the video then comes out on its first."""
    if group is None:
        return vae.decode_stream(latent, **options)  # type: ignore[no-any-return]
    return parallel_decode_stream(vae, latent, group, **options)
