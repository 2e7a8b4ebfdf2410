# SPDX-License-Identifier: Apache-2.0
"""``skiparse_groups`` by PyTorch's own strided copies, straight into the result."""

from __future__ import annotations

from torch import Tensor

from ..._registry import OPS, Backend
from ...skiparse_groups import fake
from ...skiparse_index import skiparse_padded_length


def skiparse_groups(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str) -> Tensor:
    """Every element copied once, to its place."""
    out, tokens = fake(x, text, sparse_n, pattern), x.shape[1]
    padded = skiparse_padded_length(tokens, sparse_n)
    places = padded // sparse_n
    if text is not None:
        out[:, :, places:].copy_(text.unsqueeze(1))
    if pattern == "single":
        rows = out.transpose(1, 2).flatten(1, 2)
        rows[:, :tokens].copy_(x)
        rows[:, tokens:padded].zero_()
        return out
    runs = out[:, :, :places].unflatten(2, (places // sparse_n, sparse_n)).transpose(1, 2)
    square = sparse_n**2
    whole = tokens // square
    runs[:, :whole].copy_(x[:, : whole * square].unflatten(1, (whole, sparse_n, sparse_n)))
    if whole * square < tokens:
        last = x.new_zeros(x.shape[0], square, *x.shape[2:])
        last[:, : tokens - whole * square].copy_(x[:, whole * square :])
        runs[:, whole].copy_(last.unflatten(1, (sparse_n, sparse_n)))
    return out


def register(device: str) -> None:
    OPS["skiparse_groups"].add_backend(device, Backend("strided_copies", skiparse_groups))
