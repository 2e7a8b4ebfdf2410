# SPDX-License-Identifier: Apache-2.0
"""What transformers do with the tensors they are given, before the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def drop_axis_1(t: Any, rank: int) -> Any:
    """The originals' tensors have an axis of size 1 after the batch; both forms are taken."""
    return t.squeeze(1) if t is not None and t.dim() == rank and t.shape[1] == 1 else t


def patch_mask(mask: Tensor, patch: Sequence[int]) -> Tensor:
    """Which tokens are valid: those with a nonzero cell anywhere in their patch.

    Args:
        mask: ``(batch, frames, height, width)``, nonzero where the latent is valid.
        patch: size of a patch along the last three axes, which it divides.

    Returns:
        ``(batch, tokens)`` bool; tokens run over frames, then rows, then columns.
    """
    return F.max_pool3d((mask != 0).float().unsqueeze(1), tuple(patch)).flatten(1) > 0
