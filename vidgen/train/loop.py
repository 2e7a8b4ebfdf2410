# SPDX-License-Identifier: Apache-2.0
"""The training loop, one for every task.

A run is a pure function of its recipe: the order of the samples depends on the seed and the number of samples seen,
every draw of a step on the seed and the step. So a resumed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen import __version__, config
from vidgen import device as devices
from vidgen.io import lock_directory, read_json, write_json

from . import checkpoint
from .errors import TrainingStopped
from .gradient_clipping import AdaptiveGradientClipping, gradient_norm
from .metrics import METRICS, MetricsLog, Progress, plot_loss, read_metrics
from .optimizer import EMAAdamW
from .profile import StepProfiler
from .recipe import Optimizer, Recipe
from .tasks import Task, build_task

logger = logging.getLogger(__name__)

FIXED = (
    "system",
    "task",
    "model.",
    "training.precision",
)  # parts of a recipe that a checkpoint cannot be resumed without
MAX_DUMPS = 3  # of skipped steps; each holds the batch and the weights


def train(recipe: Recipe, *, resume: str = "auto", profile_steps: int = 0) -> dict[str, Any]:
    """Train as the recipe says and return the report, which is also written as ``report.json``.

    Args:
        resume: "auto" goes on from the newest checkpoint of ``recipe.output`` that verifies, or begins; "none" begins
            and refuses a folder that holds checkpoints; a path goes on from that checkpoint.
        profile_steps: this many steps are traced into the folder ``profile`` of the run.

    Returns:
        The report; ``"finished"`` is False where SIGTERM ended the run, after a checkpoint.

    Raises:
        ValueError: the recipe, the data or the checkpoint do not fit.
        vidgen.io.LockError: another process trains into ``recipe.output``.
        vidgen.data.dataset.BrokenClipsError: too many clips are broken.
        TrainingStopped: three steps in a row were not finite, or three saves in a row failed.
    """
    with lock_directory(recipe.output), _sigterm() as terminated:
        run = _Run(recipe, resume)
        try:
            return run.train(terminated, profile_steps)
        finally:
            run.close()


def step_seed(seed: int, step: int, micro_step: int = 0) -> int:
    """A 63-bit seed for the draws of one micro-step; neighbours share nothing."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def learning_rate(options: Optimizer, step: int, steps: int) -> float:
    """Rate of a step counted from 1: ``lr * min(1, step / warmup_steps)``, then constant or a cosine to the end."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    fraction = options.final_lr_fraction
    return options.lr * (fraction + (1 - fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


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


class _Run:
    """Everything that a run holds between its steps."""

    def __init__(self, recipe: Recipe, resume: str) -> None:
        self.recipe, self.output = recipe, Path(recipe.output)
        self.device = devices.resolve(recipe.device)
        found = checkpoint.find_checkpoint(self.output, resume)
        checkpoint.remove_unfinished(self.output)
        torch.manual_seed(recipe.seed)
        self.task: Task = build_task(recipe, self.device, weights=found and found / "model")
        self.parameters = [p for p in self.task.model.parameters() if p.requires_grad]
        for p in self.parameters:
            p.grad_dtype = torch.float32  # micro-batches add up in float32 whatever the weights are
        options = recipe.optimizer
        self.optimizer = EMAAdamW(
            self.parameters,
            options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            ema_decay=options.ema_decay,
        )
        self.clipping = AdaptiveGradientClipping(recipe.clipping.decay)
        self.step, self.skipped, self.skipped_in_row, self.failed_saves = 0, 0, 0, 0
        if found is not None:
            self._load(found)
        config.save(recipe, self.output / "config.yaml")
        self.log = MetricsLog(self.output / METRICS, last_step=self.step)
        self.samples = self.task.samples(start=self.step * recipe.training.batch_size * recipe.training.accumulation)

    # Checkpoints

    def _load(self, folder: Path) -> None:
        saved = config.load(Recipe, folder / "config.yaml")
        changes = dict(_differences(config.to_dict(saved), config.to_dict(self.recipe)))
        if fixed := [text for name, text in changes.items() if name.startswith(FIXED)]:
            raise ValueError(f"resume: {folder} was trained with another recipe: {'; '.join(fixed)}")
        for text in changes.values():
            logger.warning("going on with a changed recipe: %s", text)
        checkpoint.load_optimizer(self.optimizer, folder)
        state = checkpoint.load_state(folder, self.device)
        self.step, self.skipped, self.skipped_in_row = state["step"], state["skipped"], state["skipped_in_row"]
        self.clipping.load_state_dict(state["clipping"])
        self.task.load_state_dict(state["task"])
        logger.warning("going on from %s", folder)

    def _fill(self, folder: Path) -> None:
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
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise TrainingStopped(f"step {self.step}: the weights are not finite; the last checkpoint is kept")
        options = self.recipe.training
        try:
            path = checkpoint.save_checkpoint(self.output, self.step, self._fill, keep=options.keep_checkpoints)
        except OSError as error:
            self.failed_saves += 1
            progress.note(f"checkpoint at step {self.step} failed and was removed: {error}")
            if self.failed_saves >= options.max_failed_saves:
                raise TrainingStopped(f"{self.failed_saves} checkpoints in a row failed, last: {error}") from error
            return
        self.failed_saves = 0
        progress.note(f"checkpoint {path.name}")
        self._plot()

    # Steps

    def _profiler(self, steps: int) -> StepProfiler | None:
        if not steps:
            return None
        options = self.recipe.training
        left, recomputes = options.steps - self.step, options.activation_checkpointing
        return StepProfiler(self.device, self.output / "profile", steps, left, recomputes=recomputes)

    def train(self, terminated: threading.Event, profile_steps: int = 0) -> dict[str, Any]:
        options = self.recipe.training
        profiler = self._profiler(profile_steps)
        progress = Progress(options.steps, start=self.step, every=options.log_every)
        began, first_step = time.monotonic(), self.step
        try:
            while self.step < options.steps and not terminated.is_set():
                with contextlib.nullcontext() if profiler is None else profiler.step():
                    record = self._step()
                if profiler is not None:
                    profiler.note(self.step, record["seconds"])
                self.log.write(record)
                progress.update(self.step, loss=record["loss"], grad_norm=record["grad_norm"], lr=record["lr"])
                due = self.step % options.checkpoint_every == 0 and self.step < options.steps
                if due and self.skipped_in_row == 0:
                    self.save(progress)
            if self.step > first_step:
                if self.step >= options.steps:
                    self._finish()
                self.save(progress)
        finally:
            progress.close()
            if profiler is not None:
                profiler.close()
            report = self._report(time.monotonic() - began, self.step - first_step)
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
        loss, batches = 0.0, []
        parts: dict[str, float] = {}
        for micro_step in range(options.accumulation):
            batch = next(self.samples)
            batches.append(batch)
            generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, self.step, micro_step))
            value, terms = self.task.loss(batch, generator)
            (value / options.accumulation).backward()
            loss += float(value.detach()) / options.accumulation
            for name, term in terms.items():
                parts[name] = parts.get(name, 0.0) + float(term) / options.accumulation
        norm, reason = self._clip()
        if not math.isfinite(loss):
            reason = "the loss is not finite"
        if reason is None:
            self.optimizer.step()
            self.skipped_in_row = 0
        else:
            self._skip(reason, loss, norm, batches)
        self.optimizer.zero_grad(set_to_none=True)
        devices.synchronize(self.device)
        seconds = time.monotonic() - began
        return {
            "step": self.step,
            "loss": loss,
            **parts,
            "grad_norm": norm,
            "lr": rate,
            "samples_per_s": options.batch_size * options.accumulation / seconds,
            "seconds": seconds,
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            **({"skipped": reason} if reason else {}),
        }

    def _clip(self) -> tuple[float, str | None]:
        """Clip the gradients in place; their norm, and why the step must not be taken (None if it may)."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.recipe.clipping.method == "adaptive":
            result = self.clipping(self.parameters)
            if result.finite and result.skip:
                return result.norm, f"the gradient norm {result.norm:.3g} is extreme (threshold {result.threshold:.3g})"
            return result.norm, None if result.finite else "the gradient is not finite"
        norm = gradient_norm(grads)
        if not math.isfinite(norm):
            return norm, "the gradient is not finite"
        limit = self.recipe.clipping.max_norm
        if self.recipe.clipping.method == "norm" and norm > limit:
            torch._foreach_mul_(grads, limit / norm)
        return norm, None

    def _skip(self, reason: str, loss: float, norm: float, batches: list[dict[str, Any]]) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        logger.warning("step %d is skipped: %s", self.step, reason)
        if self.skipped <= MAX_DUMPS:
            try:
                self._dump(reason, loss, norm, batches)
            except OSError as error:
                logger.error("the skipped step could not be kept: %s", error)
        limit = self.recipe.training.max_skipped_steps
        if self.skipped_in_row >= limit:
            raise TrainingStopped(
                f"{limit} steps in a row were skipped, last at step {self.step}: {reason}; "
                f"the last checkpoint is intact, the steps lie under {self.output / 'skipped'}"
            )

    def _dump(self, reason: str, loss: float, norm: float, batches: list[dict[str, Any]]) -> None:
        """Keep what `replay` needs to repeat a skipped step."""
        from safetensors.torch import save_file

        folder = self.output / "skipped" / f"{checkpoint.PREFIX}{self.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        others: list[dict[str, Any]] = []
        for number, batch in enumerate(batches):
            kept = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            tensors |= {f"{number}.{name}": value.contiguous().cpu() for name, value in kept.items()}
            others.append({name: value for name, value in batch.items() if name not in kept})
        bad = [name for name, p in self.task.model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        save_file(tensors, folder / "batch.safetensors")
        self.task.save(folder / "model")
        config.save(self.recipe, folder / "config.yaml")
        facts = {"step": self.step, "reason": reason, "loss": str(loss), "grad_norm": str(norm)}
        write_json(folder / "step.json", {**facts, "not_finite": bad, "batches": others})

    # Reports

    def _write_report(self, report: dict[str, Any]) -> None:
        """Write the report; a disk that is full must not hide why the run ended."""
        try:
            write_json(self.output / "report.json", report)
        except OSError as error:
            logger.error("the report could not be written: %s", error)

    def _plot(self) -> None:
        try:
            plot_loss(read_metrics(self.output / METRICS), self.output / "loss.png", f"{self.recipe.task} loss")
        except OSError as error:
            logger.error("the loss plot could not be written: %s", error)

    def _report(self, seconds: float, num_steps: int) -> dict[str, Any]:
        losses = [r["loss"] for r in read_metrics(self.output / METRICS) if not r.get("skipped")]
        tenth = max(1, len(losses) // 10)
        return {
            "task": self.recipe.task,
            "finished": self.step >= self.recipe.training.steps,
            "step": self.step,
            "loss_first": sum(losses[:tenth]) / tenth if losses else None,
            "loss_last": sum(losses[-tenth:]) / tenth if losses else None,
            "skipped_steps": self.skipped,
            "parameters": sum(p.numel() for p in self.parameters),
            "seconds": round(seconds, 3),
            "seconds_per_step": round(seconds / num_steps, 4) if num_steps else None,
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            "device": devices.describe(self.device),
            "versions": {"vidgen": __version__, "torch": torch.__version__},
            **self.task.report(),
        }

    def close(self) -> None:
        self.log.close()


def replay(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Repeat a skipped step from its dump (``skipped/step_*``): its batch, its weights, its draws.

    Args:
        recipe: of the run; data and encoders must still be there.
        folder: the dump.

    Returns:
        Loss and gradient norm, and the parameters whose gradient is not finite, as text and lists for JSON.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    facts = read_json(folder / "step.json")
    task = build_task(recipe, devices.resolve(recipe.device), weights=folder / "model")
    tensors, loss = load_file(folder / "batch.safetensors"), 0.0
    for micro_step, rest in enumerate(facts["batches"]):
        prefix = f"{micro_step}."
        batch = {**rest, **{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}}
        generator = torch.Generator().manual_seed(step_seed(recipe.seed, facts["step"], micro_step))
        value, _ = task.loss(batch, generator)
        (value / len(facts["batches"])).backward()
        loss += float(value.detach()) / len(facts["batches"])
    gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    return {
        "step": facts["step"],
        "reason": facts["reason"],
        "loss": str(loss),
        "grad_norm": str(gradient_norm(list(gradients.values()))),
        "not_finite": [name for name, grad in gradients.items() if not _finite(grad)],
    }


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and description of every value that differs, but for those that may."""
    for name in sorted(old.keys() | new.keys()):
        here = f"{path}.{name}" if path else name
        if isinstance(new.get(name), dict) and isinstance(old.get(name), dict):
            yield from _differences(old[name], new[name], here)
        elif old.get(name) != new.get(name) and here not in ("output", "training.steps"):
            yield here, f"{here} {old.get(name)!r} is now {new.get(name)!r}"
