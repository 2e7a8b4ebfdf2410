# SPDX-License-Identifier: Apache-2.0
"""File formats of model weights."""

from .hf import PretrainedModel, from_pretrained, load_into, load_state_dict, save_pretrained

__all__ = ["PretrainedModel", "from_pretrained", "load_into", "load_state_dict", "save_pretrained"]
