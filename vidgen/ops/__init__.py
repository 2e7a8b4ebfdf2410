# SPDX-License-Identifier: Apache-2.0
"""The kernel library: ``from vidgen import ops``. Needs torch and nothing else.

Attention tensors are ``(batch, sequence, heads, head_dim)``; videos and latents are
``(batch, channels, frames, height, width)``; tokens run over frames, then rows, then columns.
"""

from ._registry import OPS, explain, table, use_backend
from .adaln_modulate import adaln_modulate
from .causal_conv3d import causal_conv3d
from .haar_2d import haar_2d, inverse_haar_2d
from .haar_3d import haar_3d, inverse_haar_3d

# The kernels join schemas that the imports above define.
from ._native import status as native_status  # isort: skip

__all__ = [
    "OPS",
    "adaln_modulate",
    "causal_conv3d",
    "explain",
    "haar_2d",
    "haar_3d",
    "inverse_haar_2d",
    "inverse_haar_3d",
    "native_status",
    "table",
    "use_backend",
]
