# SPDX-License-Identifier: Apache-2.0
"""What checkpoints of the WFVAE hold. The names of tensors are the original's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .wavelets import all_taps, check_taps


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
    check_taps(state)
    return {**all_taps(), **state}
