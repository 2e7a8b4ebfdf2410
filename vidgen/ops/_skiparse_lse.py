# SPDX-License-Identifier: Apache-2.0
"""What ``skiparse_attention_lse`` and its gradient share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._registry import Cost
from .attention import reference_lse as attend_plainly
from .skiparse_attention import as_one_sequence, in_every_group, new_args
from .skiparse_attention import samples as samples_of_attention
from .skiparse_index import tokens_to_groups

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_n: int,
    pattern: str,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
    grouped: bool,
    num_tokens: int,
) -> Results:
    q, k, v, own, shown = as_one_sequence(
        q, k, v, sparse_n, pattern, text_k, text_v, mask, text_mask, grouped, num_tokens
    )
    text_q = q[:, :0] if text_q is None else text_q
    texts = [attend_plainly(text_q, k, v, shown[:, g], scale) for g in range(sparse_n)]
    outs, lses = zip(*texts, strict=True)
    return *attend_plainly(q, k, v, own, scale), torch.stack(outs, 1), torch.stack(lses, 1)


def fake(q: Tensor, k: Tensor, v: Tensor, sparse_n: int, pattern: str, text_q: Tensor | None, *rest: Any) -> Results:
    *_, tokens = rest
    batch, _, heads, dim = q.shape
    text = 0 if text_q is None else text_q.shape[1]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(batch, tokens, heads, dim),
        q.new_empty(batch, heads, tokens, dtype=lse_dtype),
        q.new_empty(batch, sparse_n, text, heads, dim),
        q.new_empty(batch, sparse_n, heads, text, dtype=lse_dtype),
    )


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Every query sees a key: a log-sum-exp of -inf has no gradient to check."""

    def first_and_some(*shape: int) -> Tensor:
        """Each group of text and each batch keeps its first key."""
        shown = torch.rand(shape, device=device) < 0.6
        shown[:, :1] = True
        return shown

    seen = [a for a in samples_of_attention(device, dtype) if a[8] is None and a[9] is None]
    return [
        *seen,
        new_args(2, 6, 1, 4, 1, "group", 3, device, dtype, mask=first_and_some(2, 6), text_mask=first_and_some(2, 3)),
        new_args(2, 5, 2, 4, 2, "single", 3, device, dtype, mask=first_and_some(2, 5), text_mask=first_and_some(2, 3)),
        new_args(1, 19, 1, 3, 1, "single", 17, device, dtype, mask=first_and_some(1, 19)),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Smaller: the original holds all scores of a group."""
    return {
        "1x2048x12x64 k=4 single, text 128": lambda: new_args(1, 2048, 12, 64, 4, "single", 128, device, dtype),
        "1x2048x12x128 k=4 group": lambda: new_args(1, 2048, 12, 128, 4, "group", 0, device, dtype),
    }


def cost(q: Tensor, k: Tensor, v: Tensor, sparse_n: int, pattern: str, text_q: Tensor | None, *_: Any) -> Cost:
    batch, tokens, heads, dim = q.shape
    text = 0 if text_q is None else text_q.shape[1]
    flops = 4 * batch * heads * dim * sparse_n * (tokens // sparse_n + text) ** 2
    return Cost(bytes=4 * batch * (tokens + text) * heads * dim * q.element_size(), flops=flops)


def in_groups(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str, grouped: bool) -> Tensor:
    """``(batch * sparse_n, places + text, heads, head_dim)``."""
    groups = x.unflatten(1, (sparse_n, -1)) if grouped else tokens_to_groups(x, sparse_n, pattern)
    if text is not None:
        groups = torch.cat((groups, in_every_group(text, sparse_n)), 2)
    return groups.flatten(0, 1)


def group_by_group_refuses(x: Tensor, *rest: Any) -> str | None:
    return "float64 is for the reference" if x.dtype == torch.float64 else None
