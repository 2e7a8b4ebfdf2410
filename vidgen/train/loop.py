# SPDX-License-Identifier: Apache-2.0
"""The training loop, one for every task.

A run is a pure function of its recipe: the order of the samples depends on the seed and the number of samples seen,
every draw of a step on the seed and the step. So a resumed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen import __version__, config
from vidgen import device as devices
from vidgen.checkpoints.distributed import is_distributed
from vidgen.io import lock_directory, write_json
from vidgen.parallel import Layout, Parallel, launch
from vidgen.parallel.sharding import local, sum_over_tensor
from vidgen.parallel.tensor import row_order
from vidgen.parallel.watchdog import Watchdog

from . import checkpoint, lora, sharded_checkpoint, skipped
from .encoding import micro_batches
from .errors import TrainingStopped
from .facts import require_legal
from .gradient_clipping import AdaptiveGradientClipping, gradient_norm, norm_over
from .metrics import METRICS, MetricsLog, Progress, plot_loss, read_metrics
from .optimizer import EMAAdamW
from .profile import StepProfiler
from .ranks import Ranks, join, tried
from .recipe import Recipe
from .sharded_checkpoint import Outcome, Saver
from .sharded_model import build_sharded, build_unfilled, saved_part, trained_names
from .sharded_optimizer import ShardedEMAAdamW
from .steps import forward_backward, learning_rate, step_seed
from .tasks import Task, build_task

if TYPE_CHECKING:
    from vidgen.parallel.pipeline import Pipeline

logger = logging.getLogger(__name__)

FIXED = (
    "system",
    "task",
    "model.",
    "training.precision",
    "lora",
)  # parts of a recipe that a checkpoint cannot be resumed without
END_FACTOR = 10.0  # the first process writes whole model folders, which takes longer than a step
MAX_DUMPS = 3  # of skipped steps; each holds the batch and the weights


def train(
    recipe: Recipe, *, resume: str = "auto", profile_steps: int = 0, layout: Layout | None = None
) -> dict[str, Any]:
    """Train as the recipe says and return the report, which is also written as ``report.json``.

    Under torchrun, or with a section ``parallel``, all processes of the run call this; see `vidgen.train.ranks`.

    Args:
        resume: "auto" goes on from the newest checkpoint of ``recipe.output`` that verifies, or begins; "none" begins
            and refuses a folder that holds checkpoints; a path goes on from that checkpoint.
        profile_steps: this many steps are traced into the folder ``profile`` of the run.
        layout: of processes that have a group already; all of its ranks call this.

    Returns:
        The report; ``"finished"`` is False where SIGTERM ended the run, after a checkpoint.

    Raises:
        ValueError: the recipe, the data or the checkpoint do not fit.
        vidgen.io.LockError: another process trains into ``recipe.output``.
        vidgen.data.dataset.BrokenClipsError: too many clips are broken.
        TrainingStopped: three steps in a row were not finite, or three saves in a row failed.
    """
    with join(recipe.parallel, recipe.device, layout) as (ranks, device), contextlib.ExitStack() as stack:
        if len({repr(config.to_dict(recipe)) for recipe in ranks.gather(recipe)}) > 1:
            raise ValueError("train: recipe must be the same on all processes")
        if ranks.layout is not None:
            for warning in require_legal(recipe, ranks.layout.size("world")):
                if ranks.is_first:
                    logger.warning(warning)
            # FSDP2 warns of results that are views, which must not be changed in place; here nothing changes them.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        ranks.on_first(lambda: stack.enter_context(lock_directory(recipe.output)))
        terminated = stack.enter_context(_sigterm())
        watchdog = stack.enter_context(_watchdog(recipe, ranks))
        run = _Run(recipe, resume, ranks, device)
        run.watchdog = watchdog
        stack.callback(run.close)
        return run.train(terminated, profile_steps)


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; only the main thread may listen to signals, elsewhere it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _watchdog(recipe: Recipe, ranks: Ranks) -> contextlib.AbstractContextManager[Watchdog | None]:
    """Of a run of several processes; one alone waits for nobody."""
    if ranks.layout is None:
        return contextlib.nullcontext()
    timeout_s = (recipe.parallel or Parallel()).timeout_s
    return Watchdog(Path(recipe.output) / "hang", timeout_s=timeout_s, rank=ranks.rank, parent=launch.parent())


class _Run:
    """Everything that a run holds between its steps."""

    watchdog: Watchdog | None = None

    def __init__(self, recipe: Recipe, resume: str, ranks: Ranks, device: torch.device) -> None:
        self.recipe, self.output = recipe, Path(recipe.output)
        self.ranks, self.layout, self.device = ranks, ranks.layout, device
        # Background writing may not share a group with training.
        self.file_groups = None if ranks.layout is None else sharded_checkpoint.own_groups(ranks=ranks.members)
        found = sharded_checkpoint.find(self.output, resume, self.file_groups and self.file_groups[1])
        ranks.on_first(lambda: checkpoint.remove_unfinished(self.output))
        torch.manual_seed(recipe.seed)
        self.task: Task = ranks.together(lambda: self._build_task(found))
        self.orders = row_order(self.task.model)
        self.pipeline = self._pipeline()
        trained = {name: p for name, p in self.task.model.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        self.num_parameters = sum(p.numel() for p in self.parameters)
        if self.pipeline is not None:
            self.num_parameters = int(self.pipeline.sum(self.num_parameters))
        options = recipe.optimizer
        hyperparameters: dict[str, Any] = {
            "lr": options.lr,
            "betas": options.betas,
            "eps": options.eps,
            "weight_decay": options.weight_decay,
            "ema_decay": options.ema_decay,
        }
        if self.layout is None:
            for p in self.parameters:
                p.grad_dtype = torch.float32  # micro-batches add up in float32 whatever the weights are
            self.optimizer: EMAAdamW | ShardedEMAAdamW = EMAAdamW(self.parameters, **hyperparameters)
            self.norm: Callable[[list[Tensor]], float] = gradient_norm
        else:
            split = recipe.parallel is None or recipe.parallel.shard_optimizer
            self.optimizer = ShardedEMAAdamW(trained, self.layout, shard_over_replicas=split, **hyperparameters)
            self.norm = norm_over(self.layout)
        self.clipping = AdaptiveGradientClipping(recipe.clipping.decay, norm=self.norm)
        self.step, self.skipped, self.skipped_in_row, self.failed_saves = 0, 0, 0, 0
        if found is not None:
            self._load(found)
        ranks.on_first(lambda: config.save(recipe, self.output / "config.yaml"))
        self.log = ranks.together(
            lambda: MetricsLog(self.output / METRICS, last_step=self.step) if ranks.is_first else None
        )
        self.samples = micro_batches(self.task, ranks, self.step, step_seed)
        self.broken = set(self.task.dataset.broken)
        self.saver: Saver | None = None
        if ranks.layout is not None:
            keep = recipe.training.keep_checkpoints
            self.saver = Saver(self.output, keep=keep, groups=self.file_groups)

    def _build_task(self, found: Path | None) -> Task:
        if self.layout is not None:
            return build_task(self.recipe, self.device, found, partial(build_sharded, ranks=self.ranks))
        if found is not None and is_distributed(found):
            return build_task(self.recipe, self.device, found, build_unfilled)
        return build_task(self.recipe, self.device, found and found / "model")

    def _pipeline(self) -> Pipeline | None:
        if self.layout is None or self.layout.size("pipeline") == 1:
            return None
        from vidgen.parallel.pipeline import Pipeline  # takes a second, for torch._dynamo

        return Pipeline(self.task.model, self.layout, self.recipe.parallel or Parallel(), self.device)

    # Checkpoints

    def _load(self, folder: Path) -> None:
        saved = config.load(Recipe, folder / "config.yaml")
        changes = dict(_differences(config.to_dict(saved), config.to_dict(self.recipe)))
        if fixed := [text for name, text in changes.items() if name.startswith(FIXED)]:
            raise ValueError(f"resume: {folder} was trained with another recipe: {'; '.join(fixed)}")
        for text in changes.values():
            logger.warning("going on with a changed recipe: %s", text)
        if isinstance(self.optimizer, ShardedEMAAdamW):
            tensors = self.optimizer.full_state()
            control = self.file_groups and self.file_groups[1]
            groups = sharded_checkpoint.load(
                folder,
                saved_part(self.recipe, self.task.model),
                tensors,
                orders=self.orders,
                names=trained_names(self.recipe, self.task.model),
                group=control,
                verified=True,
            )
            self.optimizer.load_full_state(tensors)
            self.optimizer.load_group_options(groups)
        elif is_distributed(folder):
            saved = saved_part(self.recipe, self.task.model)
            sharded_checkpoint.load_one_process(folder, saved, self.optimizer, verified=True)
        else:
            checkpoint.load_optimizer(self.optimizer, folder)
        state = checkpoint.load_state(folder, self.device)
        self.step, self.skipped, self.skipped_in_row = state["step"], state["skipped"], state["skipped_in_row"]
        self.clipping.load_state_dict(state["clipping"])
        self.task.load_state_dict(state["task"])
        logger.warning("going on from %s", folder)

    def _fill(self, folder: Path) -> None:
        if isinstance(self.optimizer, ShardedEMAAdamW):
            sharded_checkpoint.write_small_files(folder, self.task.model, self.optimizer.param_groups)
        else:
            self.task.save(folder / "model")
            if self.recipe.optimizer.ema_decay is not None:
                with self.optimizer.use_ema():
                    self.task.save(folder / "ema")
            checkpoint.save_optimizer(self.optimizer, folder)
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "clipping": self.clipping.state_dict(),
            "task": self.task.state_dict(),
        }
        checkpoint.save_state(folder, state, self.device)
        self.task.save_beside(folder)
        config.save(self.recipe, folder / "config.yaml")

    def save(self, progress: Progress) -> None:
        """Write a checkpoint. A failure is noted and the run goes on; too many in a row end it."""
        finite = all(bool(torch.isfinite(local(p)).all()) for p in self.parameters)
        if any(self.ranks.any(not finite)):
            raise TrainingStopped(f"step {self.step}: the weights are not finite; the last checkpoint is kept")
        if self.saver is not None:
            self._save_in_background(self.saver, progress)
            return
        path, error = None, None
        try:
            keep = self.recipe.training.keep_checkpoints
            path = checkpoint.save_checkpoint(self.output, self.step, self._fill, keep=keep)
        except OSError as problem:
            error = str(problem)
        self._saved(progress, self.step, path, error)

    def _save_in_background(self, saver: Saver, progress: Progress) -> None:
        """Copy what is to be saved and let it be written while training goes on; the last checkpoint is waited for."""
        assert isinstance(self.optimizer, ShardedEMAAdamW)
        if self.watchdog is not None:
            self.watchdog.phase(f"saving step {self.step}", END_FACTOR)
        self._note_saved(progress, saver.wait())
        last = self.step >= self.recipe.training.steps
        averaged, recipe = self.recipe.optimizer.ema_decay is not None, self.recipe
        export = partial(sharded_checkpoint.export, ema=averaged, dtype=self.task.dtype)
        if recipe.lora is not None:
            export = partial(lora.export, ema=averaged, lora=recipe.lora, base=recipe.model.get("pretrained"))
        saved = saved_part(recipe, self.task.model)
        saver.start(
            self.step,
            sharded_checkpoint.snapshot(saved, self.optimizer.full_state("cpu"), self.orders),
            self._fill,
            export if last else None,
        )

    def _note_saved(self, progress: Progress, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._saved(progress, outcome.step, outcome.path, outcome.error)

    def _saved(self, progress: Progress, step: int, path: Path | None, error: str | None) -> None:
        if error is not None:
            self.failed_saves += 1
            progress.note(f"checkpoint at step {step} failed and was removed: {error}")
            if self.failed_saves >= self.recipe.training.max_failed_saves:
                raise TrainingStopped(f"{self.failed_saves} checkpoints in a row failed, last: {error}")
            return
        self.failed_saves = 0
        if path is not None:
            progress.note(f"checkpoint {path.name}")
            self._plot()

    # Steps

    def _profiler(self, steps: int) -> StepProfiler | None:
        if not steps:
            return None
        options = self.recipe.training
        left, recomputes = options.steps - self.step, options.activation_checkpointing
        return self.ranks.together(
            lambda: (
                StepProfiler(self.device, self.output / "profile", steps, left, recomputes=recomputes)
                if self.ranks.is_first
                else None
            )
        )

    def train(self, terminated: threading.Event, profile_steps: int = 0) -> dict[str, Any]:
        options = self.recipe.training
        profiler = self._profiler(profile_steps)
        silent = not self.ranks.is_first
        progress = Progress(options.steps, start=self.step, every=options.log_every, silent=silent)
        began, first_step = time.monotonic(), self.step
        try:
            while self.step < options.steps and not any(self.ranks.any(terminated.is_set())):
                if self.watchdog is not None:
                    self.watchdog.step(self.step + 1)
                with contextlib.nullcontext() if profiler is None else profiler.step():
                    record = self._step()
                if profiler is not None:
                    profiler.note(self.step, record["seconds"])
                if self.log is not None:
                    self.log.write(record)
                progress.update(self.step, loss=record["loss"], grad_norm=record["grad_norm"], lr=record["lr"])
                if self.saver is not None:
                    self._note_saved(progress, self.saver.poll())
                due = self.step % options.checkpoint_every == 0 and self.step < options.steps
                if due and self.skipped_in_row == 0:
                    self.save(progress)
            if self.watchdog is not None:
                self.watchdog.phase("the end of the run", END_FACTOR)
            if self.step > first_step:
                if self.step >= options.steps:
                    self._finish()
                self.save(progress)
            if self.saver is not None:
                self._note_saved(progress, self.saver.wait())
        except TrainingStopped:  # on all processes together
            if self.saver is not None:
                self.saver.wait()  # what is being written was good
            raise
        finally:
            progress.close()
            if profiler is not None:
                profiler.close()
            report = self._report(time.monotonic() - began, self.step - first_step)
            if self.ranks.is_first:
                self._write_report(report)
        return report

    def _finish(self) -> None:
        averaged = self.recipe.optimizer.ema_decay is not None
        with self.optimizer.use_ema() if averaged else contextlib.nullcontext():
            self.task.finish()

    def _step(self) -> dict[str, Any]:
        options, began = self.recipe.training, time.monotonic()
        self.step += 1
        rate = learning_rate(self.recipe.optimizer, self.step, options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._next_batches()
        micro_steps = [m * self.ranks.data_ranks + self.ranks.data_rank for m in range(options.accumulation)]
        seeds = [step_seed(self.recipe.seed, self.step, micro_step) for micro_step in micro_steps]
        divisor = options.accumulation * self.ranks.data_ranks * self.ranks.sequence_ranks
        if self.pipeline is None:
            loss, parts = forward_backward(self.task, batches, seeds, divisor, self.layout)
        else:
            from . import pipelined

            loss, parts = pipelined.forward_backward(self.task, self.pipeline, batches, seeds, divisor, self.ranks)
        if self.layout is not None:
            sum_over_tensor(self.parameters, self.layout)
            parts = self.ranks.mean({**parts, "loss": loss})
            loss = parts.pop("loss")
        norm, reason = self._clip()
        if not math.isfinite(loss):
            reason = "the loss is not finite"
        if reason is None:
            self.optimizer.step()
            self.skipped_in_row = 0
        else:
            self._skip(reason, loss, norm, batches, micro_steps)
        self.optimizer.zero_grad(set_to_none=True)
        devices.synchronize(self.device)
        seconds = time.monotonic() - began
        return {
            "step": self.step,
            "loss": loss,
            **parts,
            "grad_norm": norm,
            "lr": rate,
            "samples_per_s": options.batch_size * options.accumulation * self.ranks.data_ranks / seconds,
            "seconds": seconds,
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            **({"skipped": reason} if reason else {}),
        }

    def _next_batches(self) -> list[dict[str, Any]]:
        """The batches of this process's micro-steps. A clip that is broken for one process is known to all then."""
        batches, error = tried(lambda: [next(self.samples) for _ in range(self.recipe.training.accumulation)])
        dataset = self.task.dataset
        failed, news = self.ranks.any(error is not None, dataset.broken.keys() != self.broken)
        if failed:
            self.ranks.raise_together(error)
        if news:
            for broken in self.ranks.gather(dataset.broken):
                dataset.broken |= {clip: reason for clip, reason in broken.items() if clip not in dataset.broken}
            dataset.note_replaced([])  # there may be too many by now
            self.broken = set(dataset.broken)
        return batches or []

    def _clip(self) -> tuple[float, str | None]:
        """Clip the gradients in place; their norm, and why the step must not be taken (None if it may)."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.recipe.clipping.method == "adaptive":
            result = self.clipping(self.parameters)
            if result.finite and result.skip:
                return result.norm, f"the gradient norm {result.norm:.3g} is extreme (threshold {result.threshold:.3g})"
            return result.norm, None if result.finite else "the gradient is not finite"
        norm = self.norm(grads)
        if not math.isfinite(norm):
            return norm, "the gradient is not finite"
        limit = self.recipe.clipping.max_norm
        if self.recipe.clipping.method == "norm" and norm > limit:
            torch._foreach_mul_([local(grad) for grad in grads], limit / norm)
        return norm, None

    def _skip(
        self, reason: str, loss: float, norm: float, batches: list[dict[str, Any]], micro_steps: list[int]
    ) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        logger.warning("step %d is skipped: %s", self.step, reason)
        if self.skipped <= MAX_DUMPS:
            try:
                facts = {"step": self.step, "reason": reason, "loss": str(loss), "grad_norm": str(norm)}
                folder = self.output / "skipped" / f"{checkpoint.PREFIX}{self.step:08d}"
                skipped.dump(
                    folder, self.task, self.ranks, self.orders, facts, dict(zip(micro_steps, batches, strict=True))
                )
            except OSError as error:
                logger.error("the skipped step could not be kept: %s", error)
        limit = self.recipe.training.max_skipped_steps
        if self.skipped_in_row >= limit:
            raise TrainingStopped(
                f"{limit} steps in a row were skipped, last at step {self.step}: {reason}; "
                f"the last checkpoint is intact, the steps lie under {self.output / 'skipped'}"
            )

    # Reports

    def _write_report(self, report: dict[str, Any]) -> None:
        """Write the report; a disk that is full must not hide why the run ended."""
        try:
            write_json(self.output / "report.json", report)
        except OSError as error:
            logger.error("the report could not be written: %s", error)

    def _plot(self) -> None:
        if not self.ranks.is_first:
            return
        try:
            plot_loss(read_metrics(self.output / METRICS), self.output / "loss.png", f"{self.recipe.task} loss")
        except OSError as error:
            logger.error("the loss plot could not be written: %s", error)

    def _report(self, seconds: float, num_steps: int) -> dict[str, Any]:
        records = read_metrics(self.output / METRICS) if self.ranks.is_first else []
        losses = [r["loss"] for r in records if not r.get("skipped")]
        tenth = max(1, len(losses) // 10)
        return {
            "task": self.recipe.task,
            "finished": self.step >= self.recipe.training.steps,
            "step": self.step,
            "loss_first": sum(losses[:tenth]) / tenth if losses else None,
            "loss_last": sum(losses[-tenth:]) / tenth if losses else None,
            "skipped_steps": self.skipped,
            "parameters": self.num_parameters,
            "seconds": round(seconds, 3),
            "seconds_per_step": round(seconds / num_steps, 4) if num_steps else None,
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            "device": devices.describe(self.device),
            "versions": {"vidgen": __version__, "torch": torch.__version__},
            **self.task.report(),
        }

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        for group in self.file_groups or ():
            dist.destroy_process_group(group)


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and description of every value that differs, but for those that may."""
    for name in sorted(old.keys() | new.keys()):
        here = f"{path}.{name}" if path else name
        if isinstance(new.get(name), dict) and isinstance(old.get(name), dict):
            yield from _differences(old[name], new[name], here)
        elif old.get(name) != new.get(name) and here not in ("output", "training.steps"):
            yield here, f"{here} {old.get(name)!r} is now {new.get(name)!r}"
