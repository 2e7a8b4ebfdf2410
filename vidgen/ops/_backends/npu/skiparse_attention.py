# SPDX-License-Identifier: Apache-2.0
"""``skiparse_attention`` in one call of npu_fusion_attention: groups are more heads, or more samples.

More heads cost no copy, but at most 256 are allowed, and all groups must see the same keys: that they do in the pattern
"single" where only text is hidden. Everything else becomes samples. Text queries stand behind those of each group, as
text keys do, so that they need no call of their own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._registry import use_backend
from ...attention import softmax_scale
from ...skiparse_attention import in_groups, key_mask
from ...skiparse_index import groups_to_tokens, skiparse_padded_length
from . import _fusion_attention, _guards
from ._packing import Packing, pack, read, readable
from .attention import attend_masked, attend_packed, fits


def refuse(
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
) -> str | None:
    batch, _, heads, dim = q.shape
    places = skiparse_padded_length(num_tokens, sparse_n) // sparse_n
    text = 0 if text_k is None else text_k.shape[1]
    # Shapes of the folded call, in which groups are samples; as heads they are within the limits too, see `by_heads`.
    folded_q, folded_k = (
        torch.empty(1, device="meta", dtype=q.dtype).expand(batch * sparse_n, rows, heads, dim)
        for rows in (places + (0 if text_q is None else text_q.shape[1]), places + text)
    )
    return _guards.available(*_fusion_attention.NAMES) or _guards.attention(folded_q, folded_k, folded_k)


def run(
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
) -> list[Tensor]:
    batch, _, heads, _ = q.shape
    pattern = "single" if sparse_n == 1 else pattern
    layout = (sparse_n, pattern, grouped, num_tokens)
    with use_backend(None):  # an op of its own, which this backend does not have
        queries, keys, values = (in_groups(x, t, *layout) for x, t in ((q, text_q), (k, text_k), (v, text_v)))
    padded = skiparse_padded_length(num_tokens, sparse_n) != num_tokens
    heads_fold = by_heads(heads, sparse_n, pattern, alike=mask is None and not padded)

    def allowed() -> Tensor:
        """(samples of the call, keys)"""
        shown = key_mask(q, sparse_n, pattern, text_k, mask, text_mask, num_tokens)
        assert shown is not None
        return shown[:, 0] if heads_fold else shown.flatten(0, 1)

    if heads_fold:
        queries, keys, values = (t.transpose(1, 2).flatten(2, 3) for t in (queries, keys, values))
    else:
        queries, keys, values = (t.flatten(0, 1) for t in (queries, keys, values))
    scale = softmax_scale(q, scale)
    sources = [m for m in (mask, text_mask) if m is not None]
    packing = None
    if (sources or padded) and readable(q, *sources):
        text = 0 if text_k is None else text_k.shape[1]
        form = (sparse_n, pattern, num_tokens, text, heads_fold, mask is None)
        packing = read(sources, form, allowed) if sources else padding(batch, *form[:4], q.device)
    if packing is not None and fits(queries, keys, packing):
        out = attend_packed(queries, keys, values, packing, scale)
    elif sources or padded:
        out = attend_masked(queries, keys, values, allowed(), scale)
    else:
        out = _fusion_attention.dense(queries, keys, values, scale)[0]
    out = out.unflatten(2, (sparse_n, heads)).transpose(1, 2) if heads_fold else out.unflatten(0, (batch, sparse_n))
    places = skiparse_padded_length(num_tokens, sparse_n) // sparse_n
    visual = groups_to_tokens(out[:, :, :places], num_tokens, pattern)
    return [visual] if text_q is None else [visual, out[:, :, places:].mean(1)]


def by_heads(heads: int, sparse_n: int, pattern: str, alike: bool) -> bool:
    return pattern == "single" and alike and sparse_n * heads <= _guards.HEADS


@functools.lru_cache(maxsize=32)
def padding(batch: int, sparse_n: int, pattern: str, num_tokens: int, text: int, device: torch.device) -> Packing:
    """Where only the padding up to whole groups is hidden, shapes tell what is: nothing has to be read."""
    on_host = torch.empty(batch, text)
    hidden = key_mask(on_host, sparse_n, pattern, on_host if text else None, None, None, num_tokens)
    assert hidden is not None
    return pack(hidden.flatten(0, 1), device)
