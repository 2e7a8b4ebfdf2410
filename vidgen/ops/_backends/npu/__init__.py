# SPDX-License-Identifier: Apache-2.0
"""The fused ops of torch_npu, for Ascend. Nothing here imports it: its ops are there once an npu tensor is.

``_guards`` holds the documented limits; what lies outside of one is refused with the reason and served by the next
backend. docs/npu_torch.md says which op of torch_npu stands behind which of ours, and why.
"""

from __future__ import annotations

import importlib

from ..._registry import OPS, Backend

SERVED = (
    "attention",
    "attention_backward",
    "attention_lse",
    "gelu",
    "group_norm_silu",
    "group_norm_silu_backward",
    "merge_attention",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "rope_3d",
    "skiparse_attention",
)


def register(device: str) -> None:
    for name in SERVED:
        module = importlib.import_module(f".{name}", __name__)
        OPS[name].add_backend(device, Backend("npu_torch", module.run, module.refuse))
