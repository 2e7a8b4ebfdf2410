# SPDX-License-Identifier: Apache-2.0
"""Runs the golden cases of Open-Sora Plan v1.3, driven by each case's own json."""

from __future__ import annotations

from collections.abc import Callable

from .comparison import Case, Comparison

RUNNERS: dict[str, Callable[[Case, Comparison], None]] = {}
NOT_BUILT = {
    "dit_forward",
    "inpaint_forward",
    "wfvae",
    "vae_blocks",
    "vae_losses",
    "haar",
    "rope",
    "rearrange_maps",
    "sampler",
    "train_loss",
    "pipeline",
    "inpaint_masks",
    "metrics",
    "data_rules",
}
