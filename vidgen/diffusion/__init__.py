# SPDX-License-Identifier: Apache-2.0
"""Diffusion as pure functions: noise levels, schedules, training losses, guidance and sampling."""

from .euler_ancestral import (
    EulerAncestralSchedule,
    euler_ancestral_schedule,
    euler_ancestral_step,
    sample_euler_ancestral,
)
from .flow_matching import (
    add_noise,
    draw_sigmas,
    flow_matching_loss,
    logit_normal_sigmas,
    loss_weights,
    masked_mean,
    mode_sigmas,
)
from .guidance import guide, rescale_guidance
from .sampling import euler_step, sample
from .schedules import dynamic_shift, linear_quadratic_schedule, shift_sigmas, shifted_linear_schedule
from .v_prediction import (
    draw_timesteps,
    min_snr_weights,
    offset_noise,
    open_sora_plan_alphas_cumprod,
    v_prediction_loss,
)

__all__ = [
    "EulerAncestralSchedule",
    "add_noise",
    "draw_sigmas",
    "draw_timesteps",
    "dynamic_shift",
    "euler_ancestral_schedule",
    "euler_ancestral_step",
    "euler_step",
    "flow_matching_loss",
    "guide",
    "linear_quadratic_schedule",
    "logit_normal_sigmas",
    "loss_weights",
    "masked_mean",
    "min_snr_weights",
    "mode_sigmas",
    "offset_noise",
    "open_sora_plan_alphas_cumprod",
    "rescale_guidance",
    "sample",
    "sample_euler_ancestral",
    "shift_sigmas",
    "shifted_linear_schedule",
    "v_prediction_loss",
]
