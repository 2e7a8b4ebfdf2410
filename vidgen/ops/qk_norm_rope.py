# SPDX-License-Identifier: Apache-2.0
"""Normalisation of queries and keys per head, then rotary embedding, in one pass over the projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import require_device, require_floating, require_like, wide
from ._draw import draw, strided
from ._registry import Choose, Cost, Op
from .rope_3d import check_rotation, random_rotation, rope_3d_table, rotate, table_gradients
from .skiparse_index import groups_to_tokens, require_ratio, skiparse_padded_length, tokens_to_groups

NORMS = ("rms", "layer")
LAYOUT = "(batch, sequence, heads, head_dim)"


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> None:
    name = "qk_norm_rope"
    require_floating(name, "q", q, 4, LAYOUT)
    require_like(name, "k", k, tuple(q.shape), q)
    if v is not None:
        require_like(name, "v", v, tuple(q.shape), q)
    parameters = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for label, t in parameters.items():
        if t is not None:
            require_like(name, label, t, (q.shape[-1],), q)
    check_norm(name, q, norm, cos, sin, style, sections, sparse_n)
    if norm == "rms" and not (q_bias is None and k_bias is None):
        raise ValueError(f"{name}: norm 'rms' has no bias")


def check_norm(
    op: str,
    q: Tensor,
    norm: str,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> None:
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {NORMS}, got {norm!r}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: cos and sin go together, got only one of them")
    if cos is not None and sin is not None:
        check_rotation(op, q, cos, sin, style, sections)
    require_ratio(op, sparse_n)


def normalise(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` in the wide dtype, normalised over the last axis but not yet scaled; and one over its deviation."""
    x = wide(x)
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def one(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
) -> Tensor:
    """The formula for q or k alone, in the wide dtype and the order of the tokens."""
    y, _ = normalise(x, norm, eps)
    y = y if weight is None else y * wide(weight)
    y = y if bias is None else y + wide(bias)
    return y if cos is None or sin is None else rotate(y, cos, sin, style, sections)


def group_layout(x: Tensor, sparse_n: int) -> Tensor:
    """(batch, tokens, ...) to group-skip order, (batch, padded, ...)."""
    return tokens_to_groups(x, sparse_n, "group").flatten(1, 2) if sparse_n > 1 else x


def token_layout(x: Tensor, num_tokens: int, sparse_n: int) -> Tensor:
    if sparse_n == 1:
        return x
    return groups_to_tokens(x.unflatten(1, (sparse_n, x.shape[1] // sparse_n)), num_tokens, "group")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rotation = (norm, eps, cos, sin, style, sections)
    new_q = group_layout(one(q, q_weight, q_bias, *rotation), sparse_n)
    new_k = group_layout(one(k, k_weight, k_bias, *rotation), sparse_n)
    new_v = q.new_empty(0) if v is None else group_layout(v, sparse_n).clone(memory_format=torch.contiguous_format)
    return new_q.to(q.dtype).contiguous(), new_k.to(q.dtype).contiguous(), new_v


def fake(q: Tensor, k: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, dim = q.shape
    shape = (batch, skiparse_padded_length(tokens, rest[-1]), heads, dim)
    return q.new_empty(shape), q.new_empty(shape), q.new_empty(0 if v is None else shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, q_weight, k_weight, q_bias, k_bias, ctx.norm, ctx.eps, cos, sin, ctx.style, ctx.sections, ctx.k = inputs
    ctx.tokens, ctx.has_v = q.shape[1], v is not None
    ctx.save_for_backward(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin)


def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, q_bias, k_bias, cos, sin = ctx.saved_tensors
    rotation = (ctx.norm, ctx.eps, cos, sin, ctx.style, ctx.sections)
    grads: dict[str, Tensor | None] = {}
    tables: list[Tensor | None] = [None, None]
    for name, grad, x, weight, bias in (("q", grad_q, q, q_weight, q_bias), ("k", grad_k, k, k_weight, k_bias)):
        grads[name], grad_weight, grad_bias = op_backward(grad, x, weight, *rotation, ctx.k)
        grads[f"{name}_weight"] = None if weight is None else grad_weight
        grads[f"{name}_bias"] = None if bias is None else grad_bias
        if cos is not None and (ctx.needs_input_grad[9] or ctx.needs_input_grad[10]):
            y = one(x, weight, bias, ctx.norm, ctx.eps, None, None, ctx.style, None)
            new = table_gradients(token_layout(grad, ctx.tokens, ctx.k), y, cos, ctx.style, ctx.sections)
            tables = [g if t is None else t + g for t, g in zip(tables, new, strict=True)]
    v = token_layout(grad_v, ctx.tokens, ctx.k).contiguous() if ctx.has_v else None
    parameters = (grads[name] for name in ("q_weight", "k_weight", "q_bias", "k_bias"))
    return grads["q"], grads["k"], v, *parameters, None, None, *tables, None, None, None


# Arguments as models have them; the backward's samples are made from these.


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    per_axis = ("half_per_axis", (4, 6, 6))
    return [
        new_args((1, 1, 1, 2), "rms", "half", None, 1, device, dtype, with_v=False),
        new_args((2, 3, 2, 16), "rms", *per_axis, 1, device, dtype, with_v=False),
        new_args((2, 5, 2, 16), "rms", *per_axis, 2, device, dtype),
        new_args((1, 4, 3, 6), "layer", "interleaved", None, 2, device, dtype, affine=False),
        new_args((2, 3, 1, 10), "layer", "half", None, 1, device, dtype),
        new_args((1, 3, 2, 33), "layer", None, None, 1, device, dtype, with_v=False),
        new_args((1, 2, 2, 7), "rms", None, None, 2, device, dtype, affine=False),
        new_args((1, 2, 1, 64), "rms", "half_per_axis", (16, 24, 24), 1, device, dtype, with_v=False),
        new_args((2, 0, 2, 4), "rms", "half", None, 2, device, dtype),
    ]


def new_args(
    shape: tuple[int, ...],
    norm: str,
    style: str | None,
    sections: tuple[int, ...] | None,
    sparse_n: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    affine: bool = True,
    with_v: bool = True,
    tables: tuple[Tensor, Tensor] | None = None,
) -> tuple[Any, ...]:
    """Views of a packed projection. ``style`` None: no rotation, as for text."""
    batch, tokens, heads, dim = shape
    q, k, v = draw((batch, tokens, 3, heads, dim), device, dtype).unbind(2)
    weights = [draw((dim,), device, dtype) if affine else None for _ in range(2)]
    biases = [draw((dim,), device, dtype) if affine and norm == "layer" else None for _ in range(2)]
    cos, sin = None, None
    if style is not None:
        angles = draw((tokens, dim // 2), device, torch.float64)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = tables or (angles.cos().to(exact), angles.sin().to(exact))
    rotation = (cos, sin, style or "half", sections)
    return q, k, v if with_v else None, *weights, *biases, norm, 1e-6, *rotation, sparse_n


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    def new(
        dim: int, sparse_n: int = 1, *, heads: int = 24, norm: str = "rms", style: str = "half_per_axis"
    ) -> tuple[Any, ...]:
        sections = (dim // 4, dim * 3 // 8, dim * 3 // 8)
        tables = rope_3d_table((4, 32, 32), sections, device=device)
        per_axis = sections if style == "half_per_axis" else None
        shape, with_v = (1, 4096, heads, dim), sparse_n > 1
        return new_args(shape, norm, style, per_axis, sparse_n, device, dtype, with_v=with_v, tables=tables)

    return {
        "1x4096x24x64": lambda: new(64),
        "1x4096x24x128": lambda: new(128),
        "1x4096x24x64 group layout k=4": lambda: new(64, 4),
        "1x4096x24x128 group layout k=4": lambda: new(128, 4),
        "1x4096x24x128 half": lambda: new(128, style="half"),
        "1x4096x24x128 interleaved": lambda: new(128, style="interleaved"),
        "1x4096x48x64 LayerNorm, interleaved": lambda: new(64, heads=48, norm="layer", style="interleaved"),
    }


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, tokens, heads = choose((0, 1, 2)), choose((0, 1, 3, 4, 17)), choose((0, 1, 2, 3, 17))
    sections, *rotation = random_rotation(choose, batch, tokens, device)
    dim = sum(sections)
    if choose((False, True)):
        dim, rotation = choose((1, 5, 33, 72)), [None, None, "half", None]
    norm = choose(NORMS)

    def parameter() -> Tensor | None:
        return strided(choose, (dim,), device, dtype) if choose((True, False)) else None

    def rows() -> Tensor:
        return strided(choose, (batch, tokens, heads, dim), device, dtype)

    v = rows() if choose((True, False)) else None
    biases = (parameter(), parameter()) if norm == "layer" else (None, None)
    return rows(), rows(), v, parameter(), parameter(), *biases, norm, 1e-5, *rotation, choose((1, 2, 3))


def cost(q: Tensor, k: Tensor, v: Tensor | None, *_: Any) -> Cost:
    return Cost(bytes=(4 if v is None else 6) * q.numel() * q.element_size())


op = Op(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? v, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "str norm, float eps, Tensor? cos, Tensor? sin, str style, int[]? sections, int sparse_n) "
    "-> (Tensor, Tensor, Tensor)",
    check,
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    save=save,
    backward=backward,
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    style: str = "half_per_axis",
    sections: Sequence[int] | None = None,
    sparse_n: int = 1,
) -> tuple[Tensor, ...]:
    """Normalise q and k over head_dim, scale by the weights, rotate, and optionally regroup the tokens.

    ``rms``: ``x / sqrt(mean(x^2) + eps) * weight``; ``layer``: ``(x - mean) / sqrt(var + eps) * weight + bias``; then
    :func:`rope_3d`. Computed in float32 and rounded once at the end (originals round after each step).

    Args:
        q, k, v: ``(batch, sequence, heads, head_dim)``, one shape and dtype, any strides: separate projections or
            ``qkv.unbind(2)`` of a packed ``(batch, sequence, 3, heads, head_dim)``. ``v`` is only moved.
        q_weight, k_weight: ``(head_dim)`` or None (no scaling).
        q_bias, k_bias: ``(head_dim)`` or None; ``layer`` only.
        norm: ``"rms"`` or ``"layer"``.
        eps: added to the mean square or the variance.
        cos, sin: tables as for :func:`rope_3d`; None (both): no rotation, as text streams need.
        style, sections: as for :func:`rope_3d`; unused without tables.
        sparse_n: above 1, the results are in the group layout of :func:`skiparse_index`, pattern ``"group"``,
            ``(batch, padded, heads, head_dim)`` with zeros in the padding, for ``skiparse_attention(grouped=True)``.

    Returns:
        ``(q, k)``, or ``(q, k, v)`` where ``v`` was given; new contiguous tensors, except that ``v`` is handed
        through as it is where ``sparse_n`` is 1.

    Raises:
        ValueError: shapes, dtypes, devices, norm, style or sections do not fit.
    """
    moved = v if sparse_n > 1 else None
    parameters = (q_weight, k_weight, q_bias, k_bias, norm, eps)
    sections = None if sections is None else tuple(sections)
    new_q, new_k, new_v = op(q, k, moved, *parameters, cos, sin, style, sections, sparse_n)
    if v is None:
        return new_q, new_k
    return new_q, new_k, new_v if sparse_n > 1 else v


# The gradient, of q or of k; an op of its own so that it dispatches too.


def check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> None:
    name = "qk_norm_rope_backward"
    require_floating(name, "x", x, 4, LAYOUT)
    check_norm(name, x, norm, cos, sin, style, sections, sparse_n)
    batch, tokens, heads, dim = x.shape
    require_like(name, "grad", grad, (batch, skiparse_padded_length(tokens, sparse_n), heads, dim), x)
    if weight is not None:
        require_like(name, "weight", weight, (dim,), x)
        require_device(name, "weight", weight, x)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    style: str,
    sections: Sequence[int] | None,
    sparse_n: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    inner = wide(token_layout(grad, x.shape[1], sparse_n))
    if cos is not None and sin is not None:
        inner = rotate(inner, cos, -sin, style, sections)
    normalised, rstd = normalise(x, norm, eps)
    grad_weight, grad_bias = (inner * normalised).sum((0, 1, 2)), inner.sum((0, 1, 2))
    inner = inner if weight is None else inner * wide(weight)
    mean = inner.mean(-1, keepdim=True) if norm == "layer" else 0
    grad_x = rstd * (inner - mean - normalised * (inner * normalised).mean(-1, keepdim=True))
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(x.dtype), grad_bias.to(x.dtype)


def fake_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1]), x.new_empty(x.shape[-1])


def backward_args(args: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """From the arguments of the forward."""
    q, _, _, weight, _, _, _, norm, eps, cos, sin, style, sections, sparse_n = args
    batch, tokens, heads, dim = q.shape
    grad = draw((batch, skiparse_padded_length(tokens, sparse_n), heads, dim), device, dtype)
    return grad, q, weight, norm, eps, cos, sin, style, sections, sparse_n


op_backward = Op(
    "qk_norm_rope_backward(Tensor grad, Tensor x, Tensor? weight, str norm, float eps, Tensor? cos, Tensor? sin, "
    "str style, int[]? sections, int sparse_n) -> (Tensor, Tensor, Tensor)",
    check_backward,
    reference_backward,
    lambda device, dtype: [backward_args(args, device, dtype) for args in samples(device, dtype)],
    lambda device, dtype: {
        name: lambda new=new: backward_args(new(), device, dtype)  # type: ignore[misc]
        for name, new in workloads(device, dtype).items()
    },
    lambda choose, device, dtype: backward_args(random_args(choose, device, dtype), device, dtype),
    lambda grad, x, *_: Cost(bytes=3 * x.numel() * x.element_size()),
    fake=fake_backward,
)
