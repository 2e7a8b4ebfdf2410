# SPDX-License-Identifier: Apache-2.0
"""What the kernels of ``qk_norm_rope`` and ``rope_3d`` share: tiles of (tokens, heads, channels) that are normalised,
rotated and moved.

A head is up to three sections of D0, D1, D2 channels (one per axis for ``half_per_axis``, else a single one), and a
section is the tensors of the first and of the second channels of its pairs, padded to widths W0, W1, W2: every load and
store is a contiguous run of channels, and no channel is looked up. Pairs that lie side by side (``interleaved``) are
loaded as they lie and split in registers.

Tokens are visited in runs of RUN, which stay runs in the group layout (``vidgen.ops.skiparse_index``): with
K = sparse_n, run m of group g is tokens m K^2 + g K + 0..K-1 and rows (g * runs_per_group + m) K + 0..K-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ._launch import power_of_2
from ._tuning import TUNING


@triton.jit
def load_pair(pointer, offset, mask, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second channels of a section, (tokens, heads, W) each, zeros outside; ``offset`` (tokens, heads, 1)."""
    if INTERLEAVED:
        c = tl.arange(0, 2 * W)[None, None, :]
        both = tl.load(pointer + (offset + c), mask=mask & (c < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], W, 2)))
    else:
        c = tl.arange(0, W)[None, None, :]
        a = tl.load(pointer + (offset + START + c), mask=mask & (c < D - D // 2), other=0.0).to(tl.float32)
        b = tl.load(pointer + (offset + START + D - D // 2 + c), mask=mask & (c < D // 2), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pair(
    pointer, offset, a, b, mask, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr
):
    kind = pointer.dtype.element_ty
    if INTERLEAVED:
        c = tl.arange(0, 2 * W)[None, None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * W))
        tl.store(pointer + (offset + c), both.to(kind), mask=mask & (c < D))
    else:
        c = tl.arange(0, W)[None, None, :]
        tl.store(pointer + (offset + START + c), a.to(kind), mask=mask & (c < D - D // 2))
        tl.store(pointer + (offset + START + D - D // 2 + c), b.to(kind), mask=mask & (c < D // 2))


@triton.jit
def rotate_pair(a, b, cos, sin, table, mask, SIGN: tl.constexpr, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """By the angle of each pair (SIGN 1) or back (-1); ``table`` (tokens, 1, 1): where each token's angles begin."""
    c = tl.arange(0, W)[None, None, :]
    co = tl.load(cos + (table + START // 2 + c), mask=mask & (c < D // 2), other=0.0).to(tl.float32)
    si = tl.load(sin + (table + START // 2 + c), mask=mask & (c < D // 2), other=0.0).to(tl.float32) * SIGN
    return a * co - b * si, b * co + a * si


@triton.jit
def scaled(a, b, weight, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A section times the weights of its channels."""
    everywhere = tl.full([1, 1, 1], 1, tl.int1)
    wa, wb = load_pair(weight, tl.zeros([1, 1, 1], tl.int32), everywhere, START, D, W, INTERLEAVED)
    return a * wa, b * wb


@triton.jit
def shifted(a, b, bias, START: tl.constexpr, D: tl.constexpr, W: tl.constexpr, INTERLEAVED: tl.constexpr):
    everywhere = tl.full([1, 1, 1], 1, tl.int1)
    ba, bb = load_pair(bias, tl.zeros([1, 1, 1], tl.int32), everywhere, START, D, W, INTERLEAVED)
    return a + ba, b + bb


@triton.jit
def centred(a, b, mean, D: tl.constexpr, W: tl.constexpr):
    """Minus the mean, and zeros again outside of the section."""
    c = tl.arange(0, W)[None, None, :]
    return tl.where(c < D - D // 2, a - mean, 0.0), tl.where(c < D // 2, b - mean, 0.0)


@triton.jit
def place_of_run(run, runs_per_group, K: tl.constexpr, RUN: tl.constexpr):
    """First token and first row of a run, int64."""
    if K > 1:
        group = run // runs_per_group
        token = ((run % runs_per_group).to(tl.int64) * K + group) * K
        row = run.to(tl.int64) * K
    else:
        token = run.to(tl.int64) * RUN
        row = token
    return token, row


@dataclass(frozen=True)
class Cut:
    """How heads are cut into sections and tokens into runs."""

    sections: tuple[int, int, int]
    interleaved: bool
    run: int
    heads_block: int
    elements: int
    warps: int

    def constants(self) -> dict[str, int | bool]:
        d = {f"D{i}": n for i, n in enumerate(self.sections)}
        w = {f"W{i}": power_of_2(n - n // 2) for i, n in enumerate(self.sections)}
        tokens = power_of_2(self.run)
        return {**d, **w, "INTERLEAVED": self.interleaved, "RUN": self.run, "TOKENS": tokens, "HEADS": self.heads_block}


def cut(x: Tensor, style: str | None, sections: Sequence[int] | None, sparse_n: int) -> Cut:
    """For heads of ``x`` (batch, tokens, heads, head_dim); ``style`` None: no rotation."""
    heads, dim = x.shape[2:]
    widths = [d for d in sections or () if d] if style == "half_per_axis" else [dim]
    channels = sum(2 * power_of_2(d - d // 2) for d in widths)
    tuning = TUNING[x.device.type]
    # As many heads as divide them all, so that no lane is idle; but not too few.
    heads_block = min(power_of_2(heads), 16, max(4, heads & -heads))
    tile = tuning.run_tile // power_of_2(sparse_n) if sparse_n > 1 else tuning.head_tile
    while heads_block > 1 and heads_block * channels > tile:
        heads_block //= 2
    run = sparse_n if sparse_n > 1 else max(1, min(16, tile // (heads_block * channels)))
    elements = power_of_2(run) * heads_block * channels
    three = (*widths, 0, 0, 0)[:3]
    return Cut(
        (three[0], three[1], three[2]), style == "interleaved", run, heads_block, elements, tuning.warps(elements)
    )


def table_strides(table: Tensor) -> tuple[int, int]:
    """Between samples and between tokens."""
    return (0 if table.dim() == 2 else table.stride(0)), table.stride(-2)
