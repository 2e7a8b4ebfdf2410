# SPDX-License-Identifier: Apache-2.0
"""Flow matching as pure functions: noise levels, schedules, training loss, guidance and sampling."""

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

__all__ = [
    "add_noise",
    "draw_sigmas",
    "dynamic_shift",
    "euler_step",
    "flow_matching_loss",
    "guide",
    "linear_quadratic_schedule",
    "logit_normal_sigmas",
    "loss_weights",
    "masked_mean",
    "mode_sigmas",
    "rescale_guidance",
    "sample",
    "shift_sigmas",
    "shifted_linear_schedule",
]
