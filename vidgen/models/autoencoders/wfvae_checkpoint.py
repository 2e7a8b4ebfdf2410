# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of the WFVAE hold. The names of tensors are the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .wavelets import BANDS_2D, all_taps, check_taps
from .wfvae_config import SCALE_4X8X8, WFVAEConfig

RGB = 3
NUM_BANDS_2D = len(BANDS_2D) * RGB
TELLING_WEIGHTS = (
    "encoder.connect_l1.weight",
    "encoder.down1.0.weight",
    "decoder.conv_in.conv.weight",
    "decoder.up2.0.conv1.conv.weight",
)


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of any form of file as a flat map in the model's names.

    As the original chooses: a running average under ``ema_state_dict`` if it is not empty (every ``module.`` in its
    names is dropped), else ``gen_model`` inside ``state_dict``, else ``state_dict``; else the map itself. Averages hold
    trained parameters only, so that wavelet taps may be missing and are filled in; nothing else may.

    Raises:
        ValueError: wavelet taps other than the model's constants, which the model would not use.
    """
    average, weights = state.get("ema_state_dict"), state.get("state_dict")
    if isinstance(average, Mapping) and average:
        state = {str(key).replace("module.", ""): value for key, value in average.items()}
    elif isinstance(weights, Mapping):
        inner = weights.get("gen_model")
        state = inner if isinstance(inner, Mapping) else weights
    frames_apart = level_1_frames_apart(state)
    check_taps(state, frames_apart=frames_apart)
    return {**all_taps(frames_apart=frames_apart), **state}


def level_1_frames_apart(state: Mapping[str, Any]) -> bool:
    """Whether the level below the video has four bands for each channel, not eight: 4x8x8 instead of 8x8x8."""
    weight = state.get("encoder.connect_l1.weight")
    return isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == NUM_BANDS_2D


def infer_config(state: Mapping[str, Any], **stated: Any) -> WFVAEConfig:
    """The configuration of a checkpoint that has none, from the names and shapes of its weights.

    Args:
        state: what :func:`convert_state_dict` returns.
        stated: fields that weights do not tell: ``t_interpolation``, ``scale``, ``shift``. The released 4x8x8 model's
            are the defaults for that variant; for 8x8x8, scale and shift default to 1 and 0.

    Raises:
        ValueError: weights that no WFVAE has.
    """
    if missing := [name for name in TELLING_WEIGHTS if not isinstance(state.get(name), Tensor)]:
        raise ValueError(f"WFVAE: not the weights of a WFVAE, they lack {', '.join(missing)}")

    def last_index(module: str) -> int:
        return max(int(key.removeprefix(module).split(".")[0]) for key in state if key.startswith(module))

    latent_dim = state["decoder.conv_in.conv.weight"].shape[1]
    connect = last_index("decoder.connect_l1.")
    values: dict[str, Any] = {
        "latent_dim": latent_dim,
        "base_channels": state["encoder.down1.0.weight"].shape[0],
        "encoder_num_resblocks": last_index("encoder.down1.") - 1,
        "decoder_num_resblocks": last_index("decoder.up2.") - 1,
        "encoder_energy_flow_hidden_size": state["encoder.connect_l1.weight"].shape[0],
        "decoder_energy_flow_hidden_size": state[f"decoder.connect_l1.{connect}.weight"].shape[1],
        "connect_res_layer_num": connect,
        "use_attention": "encoder.mid.1.q.conv.weight" in state,
        "norm_type": "layernorm" if "encoder.norm_out.norm.weight" in state else "groupnorm",
    }
    if level_1_frames_apart(state):
        values |= {"vae_scale_factor": (4, 8, 8), "scale": (SCALE_4X8X8,) * latent_dim, "shift": (0.0,) * latent_dim}
    return WFVAEConfig(**{**values, **stated})
