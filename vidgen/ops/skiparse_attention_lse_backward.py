# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``skiparse_attention_lse``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import describe, require_device, wide
from ._draw import draw, strided
from ._registry import Backend, Choose, Cost, Op
from ._skiparse_lse import cost as cost_of_forward
from ._skiparse_lse import fake as fake_forward
from ._skiparse_lse import group_by_group_refuses, in_groups
from ._skiparse_lse import reference as forward
from ._skiparse_lse import samples as samples_of_inputs
from ._skiparse_lse import workloads as workloads_of_inputs
from .attention import gradients_lse
from .skiparse_attention import as_one_sequence, checker, grouped_rows, key_mask
from .skiparse_attention import random_args as random_inputs
from .skiparse_index import groups_to_tokens, tokens_to_groups

SCHEMA = (
    "skiparse_attention_lse_backward(Tensor grad, Tensor grad_lse, Tensor grad_text, Tensor grad_text_lse, "
    "Tensor q, Tensor k, Tensor v, int sparse_n, str pattern, Tensor? text_q, Tensor? text_k, Tensor? text_v, "
    "Tensor? mask, Tensor? text_mask, float? scale, bool grouped, int num_tokens, "
    "Tensor out, Tensor lse, Tensor text_out, Tensor text_lse) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
    "Tensor grad_text_q, Tensor grad_text_k, Tensor grad_text_v)"
)
check_inputs = checker("skiparse_attention_lse_backward")


def check(grad: Tensor, grad_lse: Tensor, grad_text: Tensor, grad_text_lse: Tensor, *rest: Any) -> None:
    inputs, results = rest[:-4], rest[-4:]
    check_inputs(*inputs)
    q, sparse_n, text_q, tokens = inputs[0], inputs[3], inputs[5], inputs[-1]
    batch, _, heads, dim = q.shape
    text = 0 if text_q is None else text_q.shape[1]
    shapes = {
        "": (batch, tokens, heads, dim),
        "_lse": (batch, heads, tokens),
        "_text": (batch, sparse_n, text, heads, dim),
        "_text_lse": (batch, sparse_n, heads, text),
    }
    grads = grad, grad_lse, grad_text, grad_text_lse
    for (name, shape), g, result in zip(shapes.items(), grads, results, strict=True):
        dtype = wide(q).dtype if name.endswith("lse") else q.dtype
        for label, t in (("grad" + name, g), ("the result of grad" + name, result)):
            if tuple(t.shape) != shape or t.dtype != dtype:
                raise ValueError(
                    f"skiparse_attention_lse_backward: {label} must be {shape} of {dtype}, got {describe(t)}"
                )
            require_device("skiparse_attention_lse_backward", label, t, q)


def reference(
    grad: Tensor,
    grad_lse: Tensor,
    grad_text: Tensor,
    grad_text_lse: Tensor,
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
    out: Tensor,
    lse: Tensor,
    text_out: Tensor,
    text_lse: Tensor,
) -> tuple[Tensor, ...]:
    """Of q, k, v and the text's; the latter have no elements where there is no such text."""
    q_w, k_w, v_w = (wide(t) for t in (q, k, v))
    text_k_w, text_v_w = (None if t is None else wide(t) for t in (text_k, text_v))
    q_w, k_w, v_w, own, shown = as_one_sequence(
        q_w, k_w, v_w, sparse_n, pattern, text_k_w, text_v_w, mask, text_mask, grouped, num_tokens
    )
    grad_q, grad_k, grad_v = gradients_lse(wide(grad), grad_lse, q_w, k_w, v_w, own, scale, out, lse)
    grad_text_q = q_w.new_zeros(0) if text_q is None else torch.zeros_like(wide(text_q))
    if text_q is not None:
        for g in range(sparse_n):
            parts = gradients_lse(
                wide(grad_text[:, g]), grad_text_lse[:, g], wide(text_q), k_w, v_w, shown[:, g], scale,
                text_out[:, g], text_lse[:, g],
            )  # fmt: skip
            grad_text_q, grad_k, grad_v = (s + p for s, p in zip((grad_text_q, grad_k, grad_v), parts, strict=True))
    texts = [g[:, num_tokens:] if text_k is not None else g.new_zeros(0) for g in (grad_k, grad_v)]
    visual = [grad_q, grad_k[:, :num_tokens], grad_v[:, :num_tokens]]
    if grouped:
        row = grouped_rows(num_tokens, sparse_n, q)
        visual = [g.new_zeros(q.shape).index_copy(1, row, g) for g in visual]
    return tuple(g.to(q.dtype).clone(memory_format=torch.contiguous_format) for g in (*visual, grad_text_q, *texts))


def fake(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, _, _, *texts = args[4:12]
    empty = [q.new_empty(0 if t is None else t.shape) for t in texts]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *empty


def with_results(inputs: tuple[Any, ...], grads: Callable[..., Tensor] = draw) -> tuple[Any, ...]:
    """The arguments of the gradient of a call with ``inputs``."""
    q = inputs[0]
    with torch.no_grad():
        results = fake_forward(*inputs) if q.device.type == "meta" else forward(*inputs)
    return *(grads(tuple(r.shape), r.device, r.dtype) for r in results), *inputs, *results


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [with_results(inputs) for inputs in samples_of_inputs(device, dtype)]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    return {
        name: lambda make=make: with_results(make())  # type: ignore[misc]
        for name, make in workloads_of_inputs(device, dtype).items()
    }


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return with_results(
        random_inputs(choose, device, dtype), lambda shape, device, dtype: strided(choose, shape, device, dtype)
    )


def cost(*args: Any) -> Cost:
    of_forward = cost_of_forward(*args[4:-4])
    return Cost(bytes=2 * of_forward.bytes, flops=5 * of_forward.flops // 2)


op = Op(SCHEMA, check, reference, samples, workloads, random_args, cost, fake=fake)


def group_by_group(
    grad: Tensor,
    grad_lse: Tensor,
    grad_text: Tensor,
    grad_text_lse: Tensor,
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
    out: Tensor,
    lse: Tensor,
    text_out: Tensor,
    text_lse: Tensor,
) -> tuple[Tensor, ...]:
    queries, keys, values = (
        in_groups(wide(x), None if t is None else wide(t), sparse_n, pattern, grouped)
        for x, t in ((q, text_q), (k, text_k), (v, text_v))
    )
    allowed = key_mask(q, sparse_n, pattern, text_k, mask, text_mask, num_tokens)
    allowed = None if allowed is None else allowed.flatten(0, 1)

    def of_groups(visual: Tensor, text: Tensor) -> Tensor:
        """(batch * sparse_n, places + text, ...)"""
        return torch.cat((tokens_to_groups(wide(visual), sparse_n, pattern), wide(text)), 2).flatten(0, 1)

    def of_groups_lse(visual: Tensor, text: Tensor) -> Tensor:
        return of_groups(visual.transpose(1, 2), text.transpose(2, 3)).transpose(1, 2)

    found = gradients_lse(
        of_groups(grad, grad_text), of_groups_lse(grad_lse, grad_text_lse), queries, keys, values, allowed, scale,
        of_groups(out, text_out), of_groups_lse(lse, text_lse),
    )  # fmt: skip
    results, texts = [], []
    for gradient, text in zip(found, (text_q, text_k, text_v), strict=True):
        groups = gradient.unflatten(0, (-1, sparse_n))
        places = groups.shape[2] - (0 if text is None else text.shape[1])
        visual = groups[:, :, :places]
        results.append(visual.flatten(1, 2) if grouped else groups_to_tokens(visual, num_tokens, pattern))
        texts.append(gradient.new_zeros(0) if text is None else groups[:, :, places:].sum(1))
    return tuple(g.to(q.dtype).clone(memory_format=torch.contiguous_format) for g in (*results, *texts))


op.add_backend("cpu", Backend("group_by_group", group_by_group, group_by_group_refuses))
