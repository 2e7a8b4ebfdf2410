# SPDX-License-Identifier: Apache-2.0
"""Skiparse attention with its log-sum-exp: an op with a gradient of its own, for kernels that read and write tokens
where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._registry import Backend, Op
from ._skiparse_lse import (
    Results,
    cost,
    fake,
    group_by_group_refuses,
    in_groups,
    reference,
    samples,
    workloads,
)
from .attention import reference_lse as attend_plainly
from .skiparse_attention import checker, key_mask, random_args
from .skiparse_attention_lse_backward import op as gradients
from .skiparse_index import groups_to_tokens

SCHEMA = (
    "skiparse_attention_lse(Tensor q, Tensor k, Tensor v, int sparse_n, str pattern, Tensor? text_q, Tensor? text_k, "
    "Tensor? text_v, Tensor? mask, Tensor? text_mask, float? scale, bool grouped, int num_tokens)"
    " -> (Tensor out, Tensor lse, Tensor text_out, Tensor text_lse)"
)


def save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    (q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask, *rest) = inputs
    ctx.save_for_backward(q, k, v, text_q, text_k, text_v, mask, text_mask, *output)
    ctx.groups, ctx.rest = (sparse_n, pattern), rest


def backward(ctx: Any, grad: Tensor, grad_lse: Tensor, grad_text: Tensor, grad_text_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, text_q, text_k, text_v, mask, text_mask, *results = ctx.saved_tensors
    grads = gradients(
        grad, grad_lse, grad_text, grad_text_lse, q, k, v, *ctx.groups, text_q, text_k, text_v, mask, text_mask,
        *ctx.rest, *results,
    )  # fmt: skip
    grad_q, grad_k, grad_v, *texts = grads
    texts = [g if t is not None else None for g, t in zip(texts, (text_q, text_k, text_v), strict=True)]
    return grad_q, grad_k, grad_v, None, None, *texts, None, None, None, None, None


op = Op(
    SCHEMA,
    checker("skiparse_attention_lse"),
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    save=save,
    backward=backward,
)


# Group by group, in PyTorch's operators: what the CPU has in place of a kernel.


def group_by_group(
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
    queries, keys, values = (
        in_groups(x, t, sparse_n, pattern, grouped) for x, t in ((q, text_q), (k, text_k), (v, text_v))
    )
    allowed = key_mask(q, sparse_n, pattern, text_k, mask, text_mask, num_tokens)
    allowed = None if allowed is None else allowed.flatten(0, 1)
    places = queries.shape[1] - (0 if text_q is None else text_q.shape[1])
    out, lse = (t.unflatten(0, (-1, sparse_n)) for t in attend_plainly(queries, keys, values, allowed, scale))
    visual = groups_to_tokens(out[:, :, :places], num_tokens, pattern)
    visual_lse = groups_to_tokens(lse[..., :places].transpose(2, 3), num_tokens, pattern).transpose(1, 2)
    parts = visual, visual_lse, out[:, :, places:], lse[..., places:]
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in parts)  # type: ignore[return-value]


op.add_backend("cpu", Backend("group_by_group", group_by_group, group_by_group_refuses))


def skiparse_attention_lse(
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
) -> Results:
    """:func:`skiparse_attention` with ``logsumexp(q k^T * scale)`` over the keys of each query; all differentiable.

    Results over parts of the keys merge as those of :func:`attention_lse` do. The text is not averaged over the groups:
    each group's result has a log-sum-exp of its own.

    Args:
        q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask, scale, grouped, num_tokens: as in
            :func:`skiparse_attention`.

    Returns:
        ``out`` ``(batch, tokens, heads, head_dim)`` in the order of the tokens and in ``q``'s dtype; ``lse``
        ``(batch, heads, tokens)`` in float32 (float64 where ``q`` is); for the text ``text_out``
        ``(batch, sparse_n, text, heads, head_dim)`` and ``text_lse`` ``(batch, sparse_n, heads, text)``, of length 0
        without ``text_q``. A query that may attend to nothing gets 0 and ``-inf``.

    Raises:
        ValueError: as :func:`skiparse_attention`.
    """
    if num_tokens is None:
        num_tokens = mask.shape[-1] if grouped and mask is not None else q.shape[1]
    return op(q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask, scale, grouped, num_tokens)
