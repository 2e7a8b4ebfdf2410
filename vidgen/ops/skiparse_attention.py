# SPDX-License-Identifier: Apache-2.0
"""Skiparse attention (Open-Sora Plan 1.3 and 1.5): dense attention inside each of k interleaved groups of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import describe, require_device
from ._draw import draw, strided
from ._registry import Choose, Cost, Op
from .attention import check_qkv
from .attention import composite as attend_dense
from .attention import reference as attend_plainly
from .skiparse_groups import op as skiparse_groups
from .skiparse_index import (
    groups_to_tokens,
    require_pattern,
    skiparse_index,
    skiparse_padded_length,
    tokens_to_groups,
)

SCHEMA = (
    "skiparse_attention(Tensor q, Tensor k, Tensor v, int sparse_n, str pattern, Tensor? text_q, Tensor? text_k, "
    "Tensor? text_v, Tensor? mask, Tensor? text_mask, float? scale, bool grouped, int num_tokens) -> Tensor[]"
)


def checker(name: str) -> Callable[..., None]:
    def check(
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
    ) -> None:
        require_pattern(name, sparse_n, pattern)
        check_qkv(name, q, k, v)
        batch, rows, heads, dim = q.shape
        if k.shape != q.shape:
            raise ValueError(f"{name}: k and v must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}")
        if grouped and pattern == "single" and sparse_n > 1:
            raise ValueError(f"{name}: grouped is for pattern 'group' only, got {pattern!r}")
        if rows != (skiparse_padded_length(num_tokens, sparse_n) if grouped else num_tokens):
            raise ValueError(f"{name}: {rows} rows do not hold num_tokens={num_tokens} at sparse_n={sparse_n}")
        if (text_k is None) != (text_v is None) or (text_k is None and (text_q is not None or text_mask is not None)):
            raise ValueError(f"{name}: text_k and text_v go together, and text_q and text_mask need both")
        if text_k is not None and text_v is not None:
            check_qkv(name, text_k if text_q is None else text_q, text_k, text_v, "text_")
            if (text_k.shape[0], *text_k.shape[2:]) != (batch, heads, dim) or text_k.dtype != q.dtype:
                raise ValueError(f"{name}: text must match q, {describe(q)}, got text_k {describe(text_k)}")
            require_device(name, "text_k", text_k, q)
        for label, m, tokens in (("mask", mask, num_tokens), ("text_mask", text_mask, _tokens(text_k))):
            if m is not None:
                if m.dtype != torch.bool or tuple(m.shape) != (batch, tokens):
                    raise ValueError(f"{name}: {label} must be {(batch, tokens)} of bool, got {describe(m)}")
                require_device(name, label, m, q)

    return check


def _tokens(text: Tensor | None) -> int:
    return 0 if text is None else text.shape[1]


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
) -> list[Tensor]:
    """Dense attention under a mask: no layout, no padding, straight from the table in skiparse_index."""
    q, k, v, own, shown = as_one_sequence(
        q, k, v, sparse_n, pattern, text_k, text_v, mask, text_mask, grouped, num_tokens
    )
    out = [attend_plainly(q, k, v, own, scale)]
    if text_q is not None:
        per_group = [attend_plainly(text_q, k, v, shown[:, g], scale) for g in range(sparse_n)]
        out.append(torch.stack(per_group).mean(0))
    return out


def as_one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_n: int,
    pattern: str,
    text_k: Tensor | None,
    text_v: Tensor | None,
    mask: Tensor | None,
    text_mask: Tensor | None,
    grouped: bool,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``q``, ``k`` and ``v`` in the order of the tokens, with the text's keys and values behind them.

    With them which keys each token sees, ``(batch, tokens, keys)``, and each group, ``(batch, sparse_n, keys)``.
    """
    group, _ = skiparse_index(num_tokens, sparse_n, pattern, device=q.device)
    if grouped:
        row = grouped_rows(num_tokens, sparse_n, q)
        q, k, v = (t[:, row] for t in (q, k, v))
    text = _tokens(text_k)
    if text_k is not None and text_v is not None:
        k, v = torch.cat((k, text_k), 1), torch.cat((v, text_v), 1)
    batch = q.shape[0]
    everything = torch.ones(batch, num_tokens + text, dtype=torch.bool, device=q.device)
    shown = everything[:, :num_tokens] if mask is None else mask
    shown = torch.cat((shown, everything[:, num_tokens:] if text_mask is None else text_mask), 1)

    def members(of: Tensor) -> Tensor:
        """Which keys the groups ``of`` contain: (batch, len(of), keys)."""
        same = of[:, None] == group[None, :]
        return F.pad(same, (0, text), value=True)[None] & shown[:, None]

    return q, k, v, members(group), members(torch.arange(sparse_n, device=q.device))


def grouped_rows(num_tokens: int, sparse_n: int, x: Tensor) -> Tensor:
    """Where each token stands in the group layout."""
    group, position = skiparse_index(num_tokens, sparse_n, "group", device=x.device)
    return group * (x.shape[1] // sparse_n) + position


def composite(
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
    """One SDPA call in which groups are more heads (single) or more samples (group).

    Tokens i*k+g of group g, (batch, places, k, heads, head_dim) in memory, are k*heads heads as they lie.
    In the group layout, (batch, k, places, heads, head_dim), they are batch*k samples as they lie.
    """
    single = pattern == "single" or sparse_n == 1
    pattern = "single" if single else pattern
    layout = (sparse_n, pattern, grouped, num_tokens)
    attend = attend_single if single else attend_group
    queries, keys, values = in_groups(q, None, *layout), in_groups(k, text_k, *layout), in_groups(v, text_v, *layout)
    allowed = key_mask(q, sparse_n, pattern, text_k, mask, text_mask, num_tokens)
    out = attend(queries, keys, values, allowed, scale)
    visual = groups_to_tokens(out, num_tokens, pattern)
    if text_q is None:
        return [visual]
    return [visual, attend(in_every_group(text_q, sparse_n), keys, values, allowed, scale).mean(1)]


def in_groups(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str, grouped: bool, num_tokens: int) -> Tensor:
    """(batch, sparse_n, places + text, heads, head_dim): a view where it can be, else one copy.

    Of the pattern "single", tokens of one place lie side by side: (batch, places + text, sparse_n, ...) in memory.
    """
    places, single = x.shape[1] // sparse_n, pattern == "single"
    if single and text is None and skiparse_padded_length(num_tokens, sparse_n) == num_tokens:
        return x.unflatten(1, (places, sparse_n)).transpose(1, 2)
    if single or not grouped:
        return skiparse_groups.overload(x, text, sparse_n, pattern)
    parts = x.unflatten(1, (sparse_n, places))
    return parts if text is None else torch.cat((parts, in_every_group(text, sparse_n)), 2)


def in_every_group(text: Tensor, sparse_n: int) -> Tensor:
    return text.unsqueeze(1).expand(-1, sparse_n, -1, -1, -1)


def attend_group(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None) -> Tensor:
    """(batch, groups, places, heads, head_dim) as batch*groups samples; ``allowed`` is (batch, groups, keys)."""
    batch = q.shape[0]
    allowed = None if allowed is None else allowed.flatten(0, 1)[:, None, None]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return attend_dense(q, k, v, allowed, scale).unflatten(0, (batch, -1))


def attend_single(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None) -> Tensor:
    """The same with groups as heads: all the heads of all groups where these fold into one axis as they lie."""
    batch, sparse_n, _, heads, _ = q.shape
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, places, groups, heads, head_dim)
    if batch == 1 and not all(t.stride(2) == heads * t.stride(3) for t in (q, k, v)):
        # Parts of a packed projection: their heads can be samples instead.
        q, k, v = (t[0].permute(2, 0, 1, 3) for t in (q, k, v))
        out = attend_dense(q, k, v, None if allowed is None else allowed.unsqueeze(2), scale)
        return out.permute(2, 1, 0, 3).unsqueeze(0)
    allowed = None if allowed is None else allowed.repeat_interleave(heads, 1).unsqueeze(2)
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))
    return attend_dense(q, k, v, allowed, scale).unflatten(2, (sparse_n, heads)).transpose(1, 2)


def key_mask(
    q: Tensor,
    sparse_n: int,
    pattern: str,
    text_k: Tensor | None,
    mask: Tensor | None,
    text_mask: Tensor | None,
    num_tokens: int,
) -> Tensor | None:
    """Which keys each group may see, (batch, sparse_n, places + text); None where nothing is hidden."""
    padded = skiparse_padded_length(num_tokens, sparse_n)
    if mask is None and text_mask is None and padded == num_tokens:
        return None
    batch = q.shape[0]
    shown = torch.ones(batch, num_tokens, dtype=torch.bool, device=q.device) if mask is None else mask
    shown = tokens_to_groups(shown, sparse_n, pattern)
    if text_k is None:
        return shown
    if text_mask is None:
        text_mask = torch.ones(batch, text_k.shape[1], dtype=torch.bool, device=q.device)
    return torch.cat((shown, text_mask.unsqueeze(1).expand(-1, sparse_n, -1)), 2)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def some(*shape: int) -> Tensor:
        return torch.rand(shape, device=device) < 0.6

    none_shown = some(2, 8)
    none_shown[0] = False
    return [
        new_args(1, 4, 1, 2, 2, "single", 0, device, dtype),
        new_args(2, 8, 2, 4, 2, "single", 0, device, dtype),
        new_args(2, 8, 2, 4, 2, "group", 0, device, dtype),
        new_args(2, 8, 2, 4, 2, "group", 3, device, dtype, grouped=True),
        new_args(1, 11, 2, 3, 3, "group", 2, device, dtype, grouped=True),
        new_args(2, 5, 1, 4, 2, "single", 3, device, dtype, text_mask=some(2, 3)),
        new_args(2, 8, 1, 3, 2, "group", 0, device, dtype, mask=none_shown),
        new_args(2, 8, 2, 3, 2, "single", 0, device, dtype, mask=none_shown),
        new_args(2, 6, 1, 4, 1, "group", 3, device, dtype, mask=some(2, 6), text_mask=some(2, 3)),
        new_args(2, 5, 1, 4, 2, "group", 3, device, dtype, text_queries=False),
        new_args(1, 0, 1, 4, 2, "single", 2, device, dtype),
    ]


def new_args(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    sparse_n: int,
    pattern: str,
    text: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    grouped: bool = False,
    text_queries: bool = True,
    make: Callable[[tuple[int, ...], torch.device, torch.dtype], Tensor] = draw,
) -> tuple[Any, ...]:
    rows = skiparse_padded_length(tokens, sparse_n) if grouped else tokens
    qkv = [make((batch, rows, heads, dim), device, dtype) for _ in range(3)]
    text_qkv: list[Tensor | None] = [None, None, None]
    if text:
        text_qkv = [make((batch, text, heads, dim), device, dtype) for _ in range(3)]
        text_qkv[0] = text_qkv[0] if text_queries else None
    return (*qkv, sparse_n, pattern, *text_qkv, mask, text_mask, None, grouped, tokens)


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        "1x4096x24x64 k=4 single": lambda: new_args(1, 4096, 24, 64, 4, "single", 0, device, dtype),
        "1x4096x24x64 k=4 group": lambda: new_args(1, 4096, 24, 64, 4, "group", 0, device, dtype, grouped=True),
        "1x4096x24x96 k=4 group, in token order": lambda: new_args(1, 4096, 24, 96, 4, "group", 0, device, dtype),
        "1x4096x24x128 k=4 single, text 512": lambda: new_args(1, 4096, 24, 128, 4, "single", 512, device, dtype),
        "1x4096x24x128 k=4 group, text 512": lambda: new_args(
            1, 4096, 24, 128, 4, "group", 512, device, dtype, grouped=True
        ),
    }


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    def some(*shape: int) -> Tensor | None:
        return torch.rand(shape, device=device) < 0.6 if choose((False, True)) else None

    batch, tokens, text = choose((1, 2)), choose((1, 2, 7, 16, 33)), choose((0, 1, 5))
    pattern, sparse_n = choose(("single", "group")), choose((1, 2, 3, 4))
    return new_args(
        batch,
        tokens,
        choose((1, 2)),
        choose((1, 4, 8)),
        sparse_n,
        pattern,
        text,
        device,
        dtype,
        mask=some(batch, tokens),
        text_mask=some(batch, text) if text else None,
        grouped=pattern == "group" and choose((False, True)),
        text_queries=choose((True, False)),
        make=lambda shape, device, dtype: strided(choose, shape, device, dtype),
    )


def cost(q: Tensor, k: Tensor, v: Tensor, sparse_n: int, pattern: str, text_q: Tensor | None, *_: Any) -> Cost:
    batch, tokens, heads, dim = q.shape
    text = 0 if text_q is None else text_q.shape[1]
    flops = 4 * batch * heads * dim * sparse_n * (tokens // sparse_n + text) ** 2
    return Cost(bytes=4 * batch * (tokens + text) * heads * dim * q.element_size(), flops=flops)


op = Op(SCHEMA, checker("skiparse_attention"), reference, samples, workloads, random_args, cost, composite=composite)


def skiparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sparse_n: int,
    pattern: str,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_v: Tensor | None = None,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    grouped: bool = False,
    num_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each group of :func:`skiparse_index`, and to the whole text where there is one.

    Visual token s attends to the visual tokens of its group and to all text tokens. A text token attends, once per
    group, to that group and to all text tokens; its result is the mean over the groups. Padding up to a multiple of
    ``sparse_n ** 2`` is hidden. Single-skip without text and padding copies nothing (of a batch, each of ``q``, ``k``
    and ``v`` whose heads and tokens do not lie side by side once); otherwise each is copied once, together with the
    text behind it, ``grouped`` ones without text not at all, and group-skip copies the result once.

    Args:
        q, k, v: ``(batch, tokens, heads, head_dim)``, floating point, any strides.
        sparse_n: number of groups; 1 is dense attention.
        pattern: ``"single"`` or ``"group"``.
        text_k, text_v: ``(batch, text, heads, head_dim)`` like ``k``; both or neither.
        text_q: ``(batch, text, heads, head_dim)``; without it nothing is computed for the text.
        mask: ``(batch, tokens)`` bool, True = attend to this token.
        text_mask: ``(batch, text)`` bool, the same for text.
        scale: default ``head_dim ** -0.5``.
        grouped: ``q``, ``k`` and ``v`` are in the group layout, ``(batch, padded, heads, head_dim)``, as
            :func:`qk_norm_rope` writes it with ``sparse_n``; pattern ``"group"`` only.
        num_tokens: number of tokens without padding, where ``grouped``; default: the length of ``mask``, or all rows.

    Returns:
        ``(batch, tokens, heads, head_dim)`` in the order of the tokens; with ``text_q`` the pair of it and
        the text's ``(batch, text, heads, head_dim)``. A query that may attend to nothing gets 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``grouped`` with the pattern ``"single"``.

    Source: Open-Sora Plan report v1.3, section "Skiparse Attention".
    """
    if num_tokens is None:
        num_tokens = mask.shape[-1] if grouped and mask is not None else q.shape[1]
    args = (q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask, scale, grouped, num_tokens)
    visual, *text = op(*args)
    return (visual, text[0]) if text else visual
