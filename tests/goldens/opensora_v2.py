# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of Open-Sora 2.0, driven by each case's own json."""

from __future__ import annotations

from collections.abc import Callable

from .comparison import Case, Comparison

RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {}
NOT_BUILT = {
    "mmdit_forward",
    "hunyuan_vae",
    "rope",
    "timestep_embedding",
    "schedule",
    "sampler",
    "conditions",
    "oscillation",
    "text_suffix",
    "train_step",
    "batch_loss",
    "ema",
    "buckets",
    "mm_buckets",
    "mm_scheduler",
    "checkpoint_convert",
    "checkpoint_keys",
}
