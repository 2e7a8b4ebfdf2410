# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of CogVideoX 1.0 and 1.5, driven by each case's own json."""

from __future__ import annotations

from collections.abc import Callable

from .comparison import Case, Comparison

RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {}
NOT_BUILT = {
    "transformer_forward",
    "sat_transformer_forward",
    "vae",
    "vae_blocks",
    "sat_vae",
    "rope",
    "schedule",
    "sampler",
    "sat_sampler",
    "image_latents",
    "dynamic_guidance",
    "train_loss",
    "pipeline",
    "checkpoint_convert",
}
