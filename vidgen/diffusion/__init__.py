# SPDX-License-Identifier: Apache-2.0
"""Diffusion as pure functions: noise levels, schedules, training losses, guidance and sampling."""

from .cogvideox import (
    cogvideox_loss,
    cogvideox_losses,
    draw_grouped_timesteps,
    draw_training_noise,
    image_latents,
    latent_frames,
    noise_image,
    pad_training_latents,
)
from .ddim import ddim_step
from .discrete import Step, cogvideox_alphas_cumprod, diffusers_steps, sat_steps, spaced_timesteps
from .discrete_sampling import draw_noise, sample_discrete
from .dpm import dpm_step
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
from .guidance import dynamic_guidance_scale, guide, rescale_guidance
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
    "Step",
    "add_noise",
    "cogvideox_alphas_cumprod",
    "cogvideox_loss",
    "cogvideox_losses",
    "ddim_step",
    "diffusers_steps",
    "dpm_step",
    "draw_grouped_timesteps",
    "draw_noise",
    "draw_sigmas",
    "draw_timesteps",
    "draw_training_noise",
    "dynamic_guidance_scale",
    "dynamic_shift",
    "euler_ancestral_schedule",
    "euler_ancestral_step",
    "euler_step",
    "flow_matching_loss",
    "guide",
    "image_latents",
    "latent_frames",
    "linear_quadratic_schedule",
    "logit_normal_sigmas",
    "loss_weights",
    "masked_mean",
    "min_snr_weights",
    "mode_sigmas",
    "noise_image",
    "offset_noise",
    "open_sora_plan_alphas_cumprod",
    "pad_training_latents",
    "rescale_guidance",
    "sample",
    "sample_discrete",
    "sample_euler_ancestral",
    "sat_steps",
    "shift_sigmas",
    "shifted_linear_schedule",
    "spaced_timesteps",
    "v_prediction_loss",
]
