# SPDX-License-Identifier: Apache-2.0
"""Tokens in the order of their Skiparse groups, the text behind each group: the keys and values of one SDPA call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import describe, require_device, require_floating, wide
from ._draw import draw, strided
from ._registry import Choose, Cost, Op
from .skiparse_index import groups_to_tokens, require_pattern, skiparse_padded_length, tokens_to_groups

SCHEMA = "skiparse_groups(Tensor x, Tensor? text, int sparse_n, str pattern) -> Tensor"


def check(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str) -> None:
    require_pattern("skiparse_groups", sparse_n, pattern)
    require_floating("skiparse_groups", "x", x, 4, "(batch, tokens, heads, head_dim)")
    if text is not None:
        batch, _, heads, dim = x.shape
        if text.dim() != 4 or (text.shape[0], *text.shape[2:]) != (batch, heads, dim) or text.dtype != x.dtype:
            wanted = f"({batch}, text, {heads}, {dim}) of {x.dtype}"
            raise ValueError(f"skiparse_groups: text must be {wanted}, got {describe(text)}")
        require_device("skiparse_groups", "text", text, x)


def reference(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str) -> Tensor:
    groups = tokens_to_groups(x, sparse_n, pattern)
    if text is not None:
        groups = torch.cat((groups, text.unsqueeze(1).expand(-1, sparse_n, -1, -1, -1)), 2)
    if pattern == "single":
        return groups.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return groups.clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str) -> Tensor:
    batch, tokens, heads, dim = x.shape
    length = skiparse_padded_length(tokens, sparse_n) // sparse_n + (0 if text is None else text.shape[1])
    if pattern == "single":
        return x.new_empty(batch, length, sparse_n, heads, dim).transpose(1, 2)
    return x.new_empty(batch, sparse_n, length, heads, dim)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, text, ctx.sparse_n, ctx.pattern = inputs
    ctx.tokens, ctx.has_text = x.shape[1], text is not None


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    places = skiparse_padded_length(ctx.tokens, ctx.sparse_n) // ctx.sparse_n
    grad_x = groups_to_tokens(grad[:, :, :places], ctx.tokens, ctx.pattern)
    grad_text = wide(grad[:, :, places:]).sum(1).to(grad.dtype) if ctx.has_text else None
    return grad_x, grad_text, None, None


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    return [
        (new(1, 1, 1, 1), None, 1, "single"),
        (new(2, 8, 2, 4), None, 2, "single"),
        (new(2, 8, 2, 4), None, 2, "group"),
        (new(2, 11, 2, 3), new(2, 5, 2, 3), 3, "group"),
        (new(2, 5, 1, 4), new(2, 3, 1, 4), 2, "single"),
        (new(2, 9, 3, 2, 4)[:, :, 2], new(2, 5, 4, 2).transpose(2, 3), 2, "group"),
        (new(1, 0, 2, 4), new(1, 3, 2, 4), 2, "group"),
        (new(0, 4, 2, 4), None, 2, "group"),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    def new(pattern: str) -> tuple[Any, ...]:
        return draw((1, 4096, 24, 64), device, dtype), draw((1, 512, 24, 64), device, dtype), 4, pattern

    return {
        "1x4096x24x64 k=4 group, text 512": lambda: new("group"),
        "1x4096x24x64 k=4 single, text 512": lambda: new("single"),
    }


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, heads, dim = choose((0, 1, 2)), choose((1, 2, 3)), choose((1, 4, 17))
    text = choose((None, 0, 1, 5))
    return (
        strided(choose, (batch, choose((0, 1, 2, 7, 16, 33)), heads, dim), device, dtype),
        None if text is None else strided(choose, (batch, text, heads, dim), device, dtype),
        choose((1, 2, 3, 4)),
        choose(("single", "group")),
    )


def cost(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str) -> Cost:
    read = x.numel() + (0 if text is None else text.numel())
    written = x.numel() + (0 if text is None else sparse_n * text.numel())
    return Cost(bytes=(read + written) * x.element_size())


op = Op(
    SCHEMA,
    check,
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    save=save,
    backward=backward,
    native_refuses=lambda *args: None,  # the kernel only moves
)


def skiparse_groups(x: Tensor, *, sparse_n: int, pattern: str, text: Tensor | None = None) -> Tensor:
    """The tokens of each group of :func:`skiparse_index`, padding as zeros, and behind them the whole text.

    Args:
        x: ``(batch, tokens, heads, head_dim)``, floating point, any strides.
        sparse_n, pattern: as for :func:`skiparse_index`.
        text: ``(batch, text, heads, head_dim)`` like ``x``, any strides; None: no text.

    Returns:
        ``(batch, sparse_n, padded / sparse_n + text, heads, head_dim)``, new. With the pattern ``"group"`` it is
        contiguous; with ``"single"`` the groups of one place lie side by side in memory, before its heads, so that
        they fold into more heads without a copy.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a ratio below 1 or an unknown pattern.
    """
    return op(x, text, sparse_n, pattern)
