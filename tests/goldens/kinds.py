# SPDX-License-Identifier: Apache-2.0
"""Which function runs a case, by the name of its folder and its kind."""

from __future__ import annotations

from collections.abc import Callable

from . import opensora_plan_v1_5
from .comparison import Case, Comparison

RUNNERS: dict[tuple[str, str], Callable[[Case, Comparison], None]] = {
    ("opensora_plan_v1_5", "agc"): opensora_plan_v1_5.agc,
    ("opensora_plan_v1_5", "checkpoint_merge"): opensora_plan_v1_5.checkpoint_merge,
    ("opensora_plan_v1_5", "dit_forward"): opensora_plan_v1_5.dit_forward,
    ("opensora_plan_v1_5", "optimizer"): opensora_plan_v1_5.optimizer,
    ("opensora_plan_v1_5", "rearrange_maps"): opensora_plan_v1_5.rearrange_maps,
    ("opensora_plan_v1_5", "sampler_trajectory"): opensora_plan_v1_5.sampler_trajectory,
    ("opensora_plan_v1_5", "sigmas"): opensora_plan_v1_5.sigmas,
    ("opensora_plan_v1_5", "train_loss_and_grads"): opensora_plan_v1_5.train_loss_and_grads,
    ("opensora_plan_v1_5", "wfvae_v1_5"): opensora_plan_v1_5.wfvae_v1_5,
}

# Kinds we know of and cannot run yet. A kind in neither table is a failure.
NOT_BUILT: dict[str, set[str]] = {
    "opensora_plan_v1_3": {
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
    },
    "opensora_plan_v1_5": {"batch_sampler", "collate", "data_rules"},
    "opensora_v2": {
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
    },
    "cogvideox": {
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
    },
}
