# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: one source for CUDA and, through triton-ascend, for Ascend.

They keep to what Triton 3.2 knows: no inline assembly, no descriptors, no selection between pointers. How blocks are
sized on each device stands in :mod:`._tuning`.
"""

from __future__ import annotations

import importlib
import importlib.util

from ..._registry import OPS, Backend

# op: module here. A module holds the op's implementation under the op's name, and `<op>_refuses` beside it.
MODULES: dict[str, str] = {
    "adaln_modulate": "adaln_modulate",
    "adaln_modulate_backward": "adaln_modulate",
    "gated_residual": "gated_residual",
    "gated_residual_adaln": "gated_residual_adaln",
    "gated_residual_adaln_backward": "gated_residual_adaln",
    "gated_residual_backward": "gated_residual",
    "group_norm_silu": "group_norm_silu",
    "group_norm_silu_backward": "group_norm_silu",
    "haar_2d": "haar",
    "haar_3d": "haar",
    "inverse_haar_2d": "haar",
    "inverse_haar_3d": "haar",
    "layer_norm_silu": "layer_norm_silu",
    "layer_norm_silu_backward": "layer_norm_silu",
    "qk_norm_rope": "qk_norm_rope",
    "qk_norm_rope_backward": "qk_norm_rope_backward",
    "rope_3d": "qk_norm_rope",
    "skiparse_attention": "skiparse_attention",
    "skiparse_attention_lse": "skiparse_attention",
    "skiparse_attention_lse_backward": "skiparse_attention",
}


def missing(device: str) -> str | None:
    """Why no kernel can be compiled for this device type, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "npu" and importlib.util.find_spec("triton.backends.ascend") is None:
        return "the installed triton is not triton-ascend"
    return None


def register(device: str) -> None:
    reason = missing(device)
    for op, name in MODULES.items():
        if reason is not None:
            OPS[op].add_backend(device, Backend("triton", OPS[op].reference, lambda *args, why=reason: why))
            continue
        module = importlib.import_module(f".{name}", __name__)
        OPS[op].add_backend(device, Backend("triton", getattr(module, op), getattr(module, f"{op}_refuses")))
        if device == "cpu":  # the interpreter comes ahead of what serves the CPU otherwise
            chain = OPS[op].backends[device]
            chain.insert(0, chain.pop())
