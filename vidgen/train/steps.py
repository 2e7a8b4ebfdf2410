# SPDX-License-Identifier: Apache-2.0
"""One step of training: its rate, where its draws come from, its forward and backward passes."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from vidgen.parallel import Layout
from vidgen.parallel.sharding import reduce_over_replicas

from .recipe import Optimizer
from .tasks import Task


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


def forward_backward(
    task: Task, batches: list[dict[str, Any]], seeds: list[int], divisor: int, layout: Layout | None
) -> tuple[float, dict[str, float]]:
    """Forward and backward passes of this process's micro-steps; gradients are added to those of the parameters.

    Args:
        batches, seeds: of each micro-step, what it is of and where its draws come from.
        divisor: what the loss of a micro-step is divided by, so that sums over micro-steps, replicas and the ranks of a
            sequence are means.

    Returns:
        The mean loss of these micro-steps, and of its terms.
    """
    loss, parts = 0.0, dict[str, float]()
    for micro_step, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        if task.recipe.lora is not None:
            torch.manual_seed(seed)  # dropout draws from the global generator
        value, terms = task.loss(batch, torch.Generator().manual_seed(seed))
        if layout is not None:
            reduce_over_replicas(task.model, last=micro_step + 1 == len(batches))
        (value / divisor).backward()
        loss += float(value.detach()) / len(batches)
        for name, term in terms.items():
            parts[name] = parts.get(name, 0.0) + float(term) / len(batches)
    return loss, parts
