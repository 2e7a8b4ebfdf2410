# SPDX-License-Identifier: Apache-2.0
"""The groups of Skiparse attention (Open-Sora Plan 1.3 and 1.5): which token belongs where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = ("single", "group")


def skiparse_index(
    num_tokens: int, sparse_n: int, pattern: str, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Group of each token and its position inside the group, for sparse ratio ``k = sparse_n``.

    ===========  ====================  ============================
    pattern      group of token s      position inside the group
    ===========  ====================  ============================
    ``single``   ``s mod k``           ``s // k``
    ``group``    ``(s // k) mod k``    ``(s // k**2) * k + s mod k``
    ===========  ====================  ============================

    Tokens are padded at the end to a multiple of ``k**2`` (:func:`skiparse_padded_length`), so that all groups
    have ``padded / k`` places; the padding takes part in nothing. The group layout puts token s at row
    ``group * (padded / k) + position``.

    Args:
        num_tokens: number of tokens, without padding.
        sparse_n: sparse ratio, 1 or more (1: one group, dense).
        pattern: ``"single"`` or ``"group"``.
        device: of the results.

    Returns:
        ``(group, position)``, each ``(num_tokens)`` of int64.

    Raises:
        ValueError: a negative length, a ratio below 1 or an unknown pattern.
    """
    require_pattern("skiparse_index", sparse_n, pattern)
    if num_tokens < 0:
        raise ValueError(f"skiparse_index: num_tokens must not be negative, got {num_tokens}")
    token = torch.arange(num_tokens, device=device)
    if pattern == "single":
        return token % sparse_n, token // sparse_n
    return token // sparse_n % sparse_n, token // sparse_n**2 * sparse_n + token % sparse_n


def skiparse_padded_length(num_tokens: int, sparse_n: int) -> int:
    """``num_tokens`` rounded up to a multiple of ``sparse_n ** 2``."""
    return -(-num_tokens // sparse_n**2) * sparse_n**2


def tokens_to_groups(x: Tensor, sparse_n: int, pattern: str) -> Tensor:
    """``(batch, tokens, ...)`` as ``(batch, sparse_n, padded / sparse_n, ...)``; padding is zero.

    A view where the pattern is single and nothing is padded, else at most two copies.
    """
    batch, tokens, *rest = x.shape
    padded = skiparse_padded_length(tokens, sparse_n)
    if padded != tokens:
        x = F.pad(x, (0, 0) * len(rest) + (0, padded - tokens))
    if pattern == "single":
        return x.view(batch, padded // sparse_n, sparse_n, *rest).transpose(1, 2)
    runs = x.unflatten(1, (padded // sparse_n**2, sparse_n, sparse_n)).transpose(1, 2)
    return runs.reshape(batch, sparse_n, padded // sparse_n, *rest)


def groups_to_tokens(x: Tensor, num_tokens: int, pattern: str) -> Tensor:
    """The inverse of :func:`tokens_to_groups`: ``(batch, sparse_n, padded / sparse_n, ...)`` to the token order."""
    batch, sparse_n, places, *rest = x.shape
    if pattern == "group":
        x = x.unflatten(2, (places // sparse_n, sparse_n)).transpose(1, 2)
    else:
        x = x.transpose(1, 2)
    return x.reshape(batch, sparse_n * places, *rest)[:, :num_tokens]


def require_pattern(op: str, sparse_n: int, pattern: str) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"{op}: pattern must be one of {PATTERNS}, got {pattern!r}")
    require_ratio(op, sparse_n)


def require_ratio(op: str, sparse_n: int) -> None:
    if sparse_n < 1:
        raise ValueError(f"{op}: sparse_n must be 1 or more, got {sparse_n}")
