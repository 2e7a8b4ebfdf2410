# SPDX-License-Identifier: Apache-2.0
"""What the processes of pool.py run: each case gets a group of its ranks, and returns plain Python.

All ranks draw the same whole problem, solve it alone, solve their part of it together and compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen import ops
from vidgen.ops import context_parallel as cp

Group = dist.ProcessGroup
Errors = dict[str, float]
Parallel = Callable[..., Any]


def draw_problem(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    *,
    text: int = 0,
    text_queries: bool = True,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Inputs of attention, of the whole sequence. The first sample's mask hides everything but a little."""
    random = torch.Generator().manual_seed(seed)

    def normal(length: int) -> Tensor:
        return torch.randn(batch, length, heads, dim, generator=random, dtype=torch.float32).to(dtype)

    def some(length: int) -> Tensor:
        mask = torch.rand(batch, length, generator=random) < 0.6
        mask[0] = False
        mask[0, length // 2 : length // 2 + 1] = True
        return mask

    problem: dict[str, Tensor | None] = {name: normal(tokens) for name in ("q", "k", "v")}
    for name in ("text_q", "text_k", "text_v"):
        problem[name] = normal(text) if text and (text_queries or name != "text_q") else None
    problem["mask"] = some(tokens) if masked else None
    problem["text_mask"] = some(text) if masked and text else None
    return problem


def alone(problem: dict[str, Tensor | None], upstream: list[Tensor], **options: Any) -> tuple[list[Tensor], Errors]:
    """Outputs and gradients of one process."""
    leaves = {name: t.clone().requires_grad_() for name, t in problem.items() if is_input(t)}
    out = ops.skiparse_attention(**{**problem, **leaves}, **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outs, upstream)
    return [o.detach() for o in outs], {name: leaf.grad for name, leaf in leaves.items()}


def is_input(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def compare(
    group: Group,
    attend: Parallel,
    problem: dict[str, Tensor | None],
    tokens: list[Tensor],
    text_tokens: list[Tensor] | None,
    rank: int,
    **options: Any,
) -> Errors:
    """Largest differences from one process, of outputs and of gradients of every input.

    ``tokens`` says which tokens each rank holds, ``text_tokens`` the same of the text; None: all of it.
    """
    ranks = len(tokens)
    random = torch.Generator().manual_seed(99)
    q, text_q = problem["q"], problem["text_q"]
    assert q is not None
    grad = torch.randn(q.shape, generator=random, dtype=torch.float32).to(q.dtype)
    grads, own_grads = [grad], [grad[:, tokens[rank]]]
    if text_q is not None:
        each = torch.randn(ranks, *text_q.shape, generator=random, dtype=torch.float32).to(q.dtype)
        grads.append(each.sum(0) if text_tokens is None else each[0])
        own_grads.append(each[rank] if text_tokens is None else each[0][:, text_tokens[rank]])
    expected, expected_grads = alone(problem, grads, **options)

    own: dict[str, Any] = {}
    for name, t in problem.items():
        if name in ("mask", "text_mask") or t is None:
            own[name] = t
        elif name.startswith("text") and text_tokens is None:
            own[name] = t.clone().requires_grad_()
        else:
            assert text_tokens is not None or not name.startswith("text")
            mine = text_tokens[rank] if name.startswith("text") and text_tokens is not None else tokens[rank]
            own[name] = t[:, mine].requires_grad_()
    out = attend(**own, **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outs, own_grads)

    errors: Errors = {}
    for name, got, want in zip(("out", "text_out"), outs, expected, strict=False):
        mine = tokens[rank] if name == "out" else text_tokens[rank] if text_tokens else slice(None)
        errors[name] = difference(got.detach(), want[:, mine])
    for name, want in expected_grads.items():
        got = own[name].grad
        if name.startswith("text") and text_tokens is None:
            dist.all_reduce(got, group=group)
            mine = slice(None)
        else:
            mine = text_tokens[rank] if name.startswith("text") and text_tokens is not None else tokens[rank]
        errors[f"grad of {name}"] = difference(got, want[:, mine])
    assert len(outs) == len(expected)
    return errors


def difference(a: Tensor, b: Tensor) -> float:
    """NaN where one is; an error of shape where they differ in it."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def placed(sizes: tuple[int, ...]) -> list[Tensor]:
    return list(torch.arange(sum(sizes)).split(list(sizes)))


def ulysses(
    group: Group,
    shape: tuple[int, int, int, int],
    *,
    text: int = 0,
    shard_text: bool = False,
    text_queries: bool = True,
    masked: bool = False,
    tell_sizes: bool = True,
    sizes: tuple[int, ...] | None = None,
    sparse_n: int = 1,
    pattern: str = "single",
) -> Errors:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    problem = draw_problem(1, *shape, text=text, text_queries=text_queries, masked=masked)
    sizes = sizes or cp.shard_sizes(shape[1], ranks)
    text_sizes = cp.shard_sizes(text, ranks) if shard_text else None

    def attend(**own: Any) -> Any:
        return cp.ulysses_attention(
            own.pop("q"),
            own.pop("k"),
            own.pop("v"),
            group,
            sizes=sizes if tell_sizes else None,
            text_sizes=text_sizes,
            **own,
        )

    text_tokens = placed(text_sizes) if text_sizes else None
    return compare(group, attend, problem, placed(sizes), text_tokens, rank, sparse_n=sparse_n, pattern=pattern)
