# SPDX-License-Identifier: Apache-2.0
"""The kernel library: ``from vidgen import ops``. Needs torch and nothing else.

Attention tensors are ``(batch, sequence, heads, head_dim)``; videos and latents are
``(batch, channels, frames, height, width)``; tokens run over frames, then rows, then columns.
"""

import importlib
import os

from . import attention_backward  # noqa: F401 - an op that only context_parallel calls
from ._registry import OPS, explain, table, use_backend
from .adaln_modulate import adaln_modulate
from .attention import attention, attention_lse
from .causal_conv3d import causal_conv3d
from .gated_residual import gated_residual
from .gated_residual_adaln import gated_residual_adaln
from .gelu import gelu
from .group_norm_silu import group_norm_silu
from .haar_2d import haar_2d, inverse_haar_2d
from .haar_3d import haar_3d, inverse_haar_3d
from .layer_norm_silu import layer_norm_silu
from .merge_attention import merge_attention
from .qk_norm_rope import qk_norm_rope
from .rope_3d import rope_3d, rope_3d_table
from .skiparse_attention import skiparse_attention
from .skiparse_attention_lse import skiparse_attention_lse
from .skiparse_groups import skiparse_groups
from .skiparse_index import skiparse_index, skiparse_padded_length

# The kernels join schemas that the imports above define.
from ._native import cpu_capability, status as native_status  # isort: skip

if os.environ.get("TRITON_INTERPRET") == "1" and native_status is not None:
    # Triton's interpreter runs kernels for accelerators on CPU tensors: slowly, to test their logic.
    importlib.import_module("vidgen.ops._backends").register("cpu")

__all__ = [
    "OPS",
    "adaln_modulate",
    "attention",
    "attention_lse",
    "causal_conv3d",
    "cpu_capability",
    "explain",
    "gated_residual",
    "gated_residual_adaln",
    "gelu",
    "group_norm_silu",
    "haar_2d",
    "haar_3d",
    "inverse_haar_2d",
    "inverse_haar_3d",
    "layer_norm_silu",
    "merge_attention",
    "native_status",
    "qk_norm_rope",
    "rope_3d",
    "rope_3d_table",
    "skiparse_attention",
    "skiparse_attention_lse",
    "skiparse_groups",
    "skiparse_index",
    "skiparse_padded_length",
    "table",
    "use_backend",
]
