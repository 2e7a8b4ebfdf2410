# SPDX-License-Identifier: Apache-2.0
"""The kernel library: ``from vidgen import ops``. Needs torch and nothing else.

Attention tensors are ``(batch, sequence, heads, head_dim)``; videos and latents are
``(batch, channels, frames, height, width)``; tokens run over frames, then rows, then columns.
"""

from ._registry import OPS, explain, table, use_backend
from .adaln_modulate import adaln_modulate

# The kernels join schemas that the imports above define.
from ._native import status as native_status  # isort: skip

__all__ = [
    "OPS",
    "adaln_modulate",
    "explain",
    "native_status",
    "table",
    "use_backend",
]
