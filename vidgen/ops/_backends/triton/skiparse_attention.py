# SPDX-License-Identifier: Apache-2.0
"""``skiparse_attention`` in Triton, with the log-sum-exp and the gradient: padding, masks and text without a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import wide
from ...attention import softmax_scale
from ...skiparse_attention_lse import op as with_lse
from ...skiparse_index import skiparse_padded_length
from ._launch import blocks, gpu, on_device_of, power_of_2, refuse_common, rows_side_by_side
from ._skiparse_backward import skiparse_delta, skiparse_grad_keys, skiparse_grad_queries
from ._skiparse_forward import skiparse_forward

TWO_LEVELS = ("cuda", "cpu")  # devices where each row may have an address of its own
MOST_CHANNELS = 256
MOST_ROWS = 128  # of a tile: addresses within it are 32 bits wide
MOST_PROGRAMS = 65535  # of one launch on Ascend


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of one tile, and how a program of them runs."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(x: Tensor, kernel: str) -> Tiles:
    """For CUDA from the shared memory and registers of an H100; for Ascend from its unified buffer."""
    kind = x.device.type
    if kind == "cpu":  # the interpreter: small, so that tests cross every boundary
        return Tiles(16, 16, 4, 1)
    narrow = x.shape[-1] <= 128
    if kind != "cuda":
        return Tiles(64, 64, 4, 1) if narrow else Tiles(32, 32, 4, 1)
    if x.dtype == torch.float32:  # without tensor cores: registers are what is short
        return Tiles(32, 32, 8, 1) if x.shape[-1] <= 32 else Tiles(16, 16, 8, 1)
    if not narrow:
        return {
            "forward": Tiles(128, 64, 8, 2),
            "grad_keys": Tiles(32, 64, 8, 1),
            "grad_queries": Tiles(64, 32, 8, 1),
        }[kernel]
    slim = x.shape[-1] <= 64
    return {
        "forward": Tiles(128, 64, 4, 3) if slim else Tiles(128, 128, 8, 2),
        "grad_keys": Tiles(64, 128, 8, 2),
        "grad_queries": Tiles(128, 64, 8, 2),
    }[kernel]


def fit(block: int, rows: int) -> int:
    """``block``, halved while that leaves fewer rows of the last tile empty: a tenth of all rows or more."""
    while block > 64 and blocks(rows, block // 2) * (block // 2) <= 0.9 * blocks(rows, block) * block:
        block //= 2
    return min(block, max(16, power_of_2(rows)))


@dataclass(frozen=True)
class Groups:
    """The steps of _skiparse_tiles, in tokens, and what else all kernels take."""

    q: Tensor
    sparse_n: int
    tokens: int
    columns: int
    in_tile: int  # COLUMNS
    token_group: int
    token_row: int
    place_group: int
    place_row: int

    @property
    def rows(self) -> int:
        """Of the longest run of tokens, or of all runs of a group."""
        return blocks(self.tokens, self.token_row) * self.in_tile

    def even(self, block: int) -> bool:
        """Whether blocks of that many rows fill each run."""
        return self.tokens % self.token_row == 0 and self.rows % block == 0

    def programs(self, tiles: int) -> tuple[int]:
        return (tiles * self.sparse_n * self.q.shape[2] * self.q.shape[0],)

    def sizes(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "heads": self.q.shape[2],
            "sparse_n": self.sparse_n,
            "columns": self.columns,
            "COLUMNS": self.in_tile,
            "place_group": self.place_group,
            "place_row": self.place_row,
            "token_group": self.token_group,
            "token_row": self.token_row,
            "D": self.q.shape[-1],
            "BLOCK_D": max(16, power_of_2(self.q.shape[-1])),
            "PRECISION": "ieee",
        }


def groups_of(q: Tensor, sparse_n: int, pattern: str, grouped: bool, tokens: int) -> Groups:
    if pattern == "single" or sparse_n == 1:
        return Groups(q, sparse_n, tokens, 1, 1, 1, sparse_n, 1, sparse_n)
    two_levels = q.device.type in TWO_LEVELS and sparse_n in (2, 4, 8, 16)  # a tile's rows are a multiple of these
    runs = (1, sparse_n) if two_levels else (sparse_n, 1)
    steps = sparse_n, sparse_n**2
    places = (skiparse_padded_length(tokens, sparse_n) // sparse_n, sparse_n) if grouped else steps
    return Groups(q, sparse_n, tokens, *runs, *steps, *places)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Of (batch, tokens, heads, head_dim), as the kernels name them."""
    axes = ("batch", "token", "head")
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate(axes)}


def run(kernel: Any, groups: Groups, number: int, cut: Tiles, queries: int, keys: int, **options: Any) -> None:
    """Launch ``number`` programs for each group, head and sample."""
    smaller = cut.queries * cut.keys // (queries * keys)
    with on_device_of(groups.q):
        kernel[groups.programs(number)](
            **options,
            **groups.sizes(),
            tiles=number,
            BLOCK_M=queries,
            BLOCK_N=keys,
            **gpu(groups.q, num_warps=max(4, cut.warps // smaller), num_stages=cut.stages),
        )


def as_bytes(mask: Tensor | None, q: Tensor) -> Tensor:
    """Kernels load bytes; where there is no mask any pointer will do."""
    return q if mask is None else mask.contiguous().view(torch.uint8)


def length(text: Tensor | None) -> int:
    return 0 if text is None else text.shape[1]


class Inputs(NamedTuple):
    """What is attended to and by whom; the elements of each head side by side."""

    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor | None
    text_k: Tensor | None
    text_v: Tensor | None
    mask: Tensor | None
    text_mask: Tensor | None

    def keys(self) -> dict[str, Any]:
        """All about keys and values that a kernel with tiles of queries takes."""
        text_k, text_v = (self.q if t is None else t for t in (self.text_k, self.text_v))
        return {
            "k": self.k, "v": self.v, "text_k": text_k, "text_v": text_v,
            **strides(k=self.k, v=self.v, text_k=text_k, text_v=text_v),
            "mask": as_bytes(self.mask, self.q), "text_mask": as_bytes(self.text_mask, self.q),
            "text": length(self.text_k), "HAS_TEXT": self.text_k is not None,
            "HAS_MASK": self.mask is not None, "HAS_TEXT_MASK": self.text_mask is not None,
        }  # fmt: skip


def inputs_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    mask: Tensor | None,
    text_mask: Tensor | None,
) -> Inputs:
    q, k, v = (rows_side_by_side(t) for t in (q, k, v))
    text_q, text_k, text_v = (None if t is None else rows_side_by_side(t) for t in (text_q, text_k, text_v))
    return Inputs(q, k, v, text_q, text_k, text_v, mask, text_mask)


def skiparse_attention_lse(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, text_out, text_lse = with_lse.fake(  # type: ignore[misc]
        q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask, scale, grouped, num_tokens
    )
    inputs = inputs_of(q, k, v, text_q, text_k, text_v, mask, text_mask)
    q, text_q = inputs.q, inputs.text_q
    groups, cut = groups_of(q, sparse_n, pattern, grouped, num_tokens), tiles(q, "forward")
    keys, queries = fit(cut.keys, groups.rows), fit(cut.queries, groups.rows)
    shared = {**inputs.keys(), "scale": softmax_scale(q, scale), "EVEN": groups.even(keys)}
    number = groups.columns * blocks(groups.rows, queries)
    run(skiparse_forward, groups, number, cut, queries, keys, **shared, q=q, out=out, lse=lse, **strides(q=q),
        text_queries=0, OF_TEXT=False)  # fmt: skip
    if text_q is not None:
        queries = fit(cut.queries, length(text_q))
        run(skiparse_forward, groups, blocks(length(text_q), queries), cut, queries, keys, **shared, q=text_q,
            out=text_out, lse=text_lse, **strides(q=text_q), text_queries=length(text_q), OF_TEXT=True)  # fmt: skip
    return out, lse, text_out, text_lse


def delta_rows(dim: int) -> int:
    """Of one program."""
    return max(16, 4096 // max(16, power_of_2(dim)))


def delta_of(grad: Tensor, out: Tensor, grad_lse: Tensor) -> Tensor:
    """grad and out ``(..., length, heads, head_dim)``, contiguous; grad_lse ``(..., heads, length)``."""
    *samples, rows, heads, dim = out.shape
    delta = torch.empty_like(grad_lse, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return delta
    block_d = max(16, power_of_2(dim))
    block = min(delta_rows(dim), max(16, power_of_2(rows)))
    number = blocks(rows, block)
    with on_device_of(out):
        skiparse_delta[(number * heads * torch.Size(samples).numel(),)](
            grad, out, grad_lse.contiguous(), delta, rows, heads, number, D=dim, BLOCK_D=block_d, BLOCK_M=block
        )
    return delta


def skiparse_attention_lse_backward(
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
    grad, grad_text, out, text_out = (t.contiguous() for t in (grad, grad_text, out, text_out))
    groups = groups_of(q, sparse_n, pattern, grouped, num_tokens)
    inputs = inputs_of(q, k, v, text_q, text_k, text_v, mask, text_mask)
    of_tokens = {"grad": grad, "lse": lse.contiguous(), "delta": delta_of(grad, out, grad_lse)}
    of_text = {"grad": grad_text, "lse": text_lse.contiguous(), "delta": delta_of(grad_text, text_out, grad_text_lse)}
    grad_k, grad_v, grad_text_k, grad_text_v = gradients_of_keys(groups, inputs, scale, of_tokens, of_text)
    grad_q, grad_text_q = gradients_of_queries(groups, inputs, scale, of_tokens, of_text)
    return grad_q, grad_k, grad_v, grad_text_q, grad_text_k, grad_text_v


def new_gradient(groups: Groups, x: Tensor) -> Tensor:
    """In the group layout no token's gradient fills the rows of the padding."""
    new = torch.empty if x.shape[1] == groups.tokens else torch.zeros
    return new(x.shape, dtype=x.dtype, device=x.device)


def parts_of(groups: Groups, text: Tensor) -> Tensor:
    """What each group adds to a gradient of the text."""
    batch, *rest = text.shape
    return torch.empty(batch, groups.sparse_n, *rest, dtype=wide(text).dtype, device=text.device)


def gradients_of_keys(
    groups: Groups, inputs: Inputs, scale: float | None, of_tokens: dict[str, Tensor], of_text: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of k, v and the text's; a program has a tile of keys and visits the queries of its group."""
    q, k, v, text_q, text_k, text_v, mask, text_mask = inputs
    cut = tiles(q, "grad_keys")
    queries, keys = fit(cut.queries, groups.rows), fit(cut.keys, groups.rows)
    seen_by = q if text_q is None else text_q
    shared = {
        **of_tokens, **{f"text_{name}": t for name, t in of_text.items() if name != "grad"},
        "grad_text": of_text["grad"], "q": q, "text_q": seen_by, **strides(q=q, text_q=seen_by),
        "text_queries": length(text_q), "text": length(text_k), "places": q.shape[1],
        "scale": softmax_scale(q, scale), "EVEN": groups.even(queries), "HAS_TEXT": text_q is not None,
    }  # fmt: skip
    grad_k, grad_v = new_gradient(groups, k), new_gradient(groups, v)
    number = groups.columns * blocks(groups.rows, keys)
    run(skiparse_grad_keys, groups, number, cut, queries, keys, **shared, k=k, v=v, mask=as_bytes(mask, q),
        grad_k=grad_k, grad_v=grad_v, **strides(k=k, v=v), HAS_MASK=mask is not None, OF_TEXT=False)  # fmt: skip
    if text_k is None or text_v is None:
        return grad_k, grad_v, q.new_empty(0), q.new_empty(0)
    part_k, part_v = parts_of(groups, text_k), parts_of(groups, text_v)
    keys = fit(cut.keys, length(text_k))
    run(skiparse_grad_keys, groups, blocks(length(text_k), keys), cut, queries, keys, **shared, k=text_k, v=text_v,
        mask=as_bytes(text_mask, q), grad_k=part_k, grad_v=part_v, **strides(k=text_k, v=text_v),
        HAS_MASK=text_mask is not None, OF_TEXT=True)  # fmt: skip
    return grad_k, grad_v, part_k.sum(1).to(q.dtype), part_v.sum(1).to(q.dtype)


def gradients_of_queries(
    groups: Groups, inputs: Inputs, scale: float | None, of_tokens: dict[str, Tensor], of_text: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of q and the text's; a program has a tile of queries and visits the keys of its group."""
    q, text_q = inputs.q, inputs.text_q
    cut = tiles(q, "grad_queries")
    keys, queries = fit(cut.keys, groups.rows), fit(cut.queries, groups.rows)
    shared = {
        **inputs.keys(), "places": q.shape[1], "scale": softmax_scale(q, scale), "EVEN": groups.even(keys),
    }  # fmt: skip
    grad_q = new_gradient(groups, q)
    number = groups.columns * blocks(groups.rows, queries)
    run(skiparse_grad_queries, groups, number, cut, queries, keys, **shared, **of_tokens, q=q, grad_q=grad_q,
        **strides(q=q), text_queries=0, OF_TEXT=False)  # fmt: skip
    if text_q is None:
        return grad_q, q.new_empty(0)
    part_q, queries = parts_of(groups, text_q), fit(cut.queries, length(text_q))
    run(skiparse_grad_queries, groups, blocks(length(text_q), queries), cut, queries, keys, **shared, **of_text,
        q=text_q, grad_q=part_q, **strides(q=text_q), text_queries=length(text_q), OF_TEXT=True)  # fmt: skip
    return grad_q, part_q.sum(1).to(q.dtype)


def skiparse_attention(*args: Any) -> list[Tensor]:
    out, _, text_out, _ = with_lse(*args)
    return [out] if args[5] is None else [out, text_out.mean(1)]


def skiparse_attention_lse_refuses(*args: Any) -> str | None:
    q, k, v, sparse_n, pattern, _, text_k, _, _, _, scale, grouped, tokens = args
    if (reason := refuse_common(*args)) is not None:
        return reason
    if q.shape[-1] > MOST_CHANNELS:
        return f"head_dim is at most {MOST_CHANNELS}, not {q.shape[-1]}"
    if scale is not None and scale <= 0:
        return f"scale must be positive, not {scale}"
    groups = groups_of(q, sparse_n, pattern, grouped, tokens)
    step = max(groups.place_row, groups.token_row) * max(t.stride(1) for t in (q, k, v))
    if step * MOST_ROWS >= 2**31:
        return f"the rows of a group lie {step} elements apart"
    if q.device.type == "npu" and (number := most_programs(groups, length(text_k))) > MOST_PROGRAMS:
        return f"it would take {number} programs, and Ascend launches at most {MOST_PROGRAMS}"
    return None


def most_programs(groups: Groups, text: int) -> int:
    """In the largest launch of a call and its gradient."""
    cuts = [tiles(groups.q, kernel) for kernel in ("forward", "grad_keys", "grad_queries")]
    least = min(min(cut.queries, cut.keys) for cut in cuts)
    number = max(groups.columns * blocks(groups.rows, fit(least, groups.rows)), blocks(text, least))
    batch, tokens, heads, dim = groups.q.shape
    return max(groups.programs(number)[0], batch * heads * blocks(tokens, delta_rows(dim)))


def skiparse_attention_lse_backward_refuses(*args: Any) -> str | None:
    return skiparse_attention_lse_refuses(*args[4:-4])


def skiparse_attention_refuses(*args: Any) -> str | None:
    """On CUDA only where keys are hidden: elsewhere the library's kernels win, even after the copies that they need."""
    q, _, _, sparse_n, _, _, _, _, mask, text_mask, _, _, tokens = args
    if (reason := skiparse_attention_lse_refuses(*args)) is not None:
        return reason
    if q.device.type == "cuda":
        if q.dtype == torch.float32:
            return "scaled_dot_product_attention is faster in float32"
        if mask is None and text_mask is None and skiparse_padded_length(tokens, sparse_n) == tokens:
            return "nothing is hidden, and there scaled_dot_product_attention is faster"
    return None
