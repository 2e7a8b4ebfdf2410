# SPDX-License-Identifier: Apache-2.0
"""Kernels that must not pass: each holds one thing that the lint or the lowering refuses. And one that passes."""

import torch
import triton
import triton.language as tl


@triton.jit
def sound(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * 2, mask=i < n)


@triton.jit
def gather(x, index, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(index + i, mask=i < n, other=0)
    tl.store(y + i, tl.load(x + j, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def scatter(x, index, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(index + i, mask=i < n, other=0)
    tl.store(y + j, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def pointer_select(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(tl.where(i < n, x + i, y + i)))


@triton.jit
def inline_assembly(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tl.load(x + i)], tl.float32, True, 1)
    tl.store(y + i, value)


@triton.jit
def too_large(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * 2, mask=i < n)


@triton.jit
def newer_than_3_2(x, y, n, BLOCK: tl.constexpr):
    block = tl.make_tensor_descriptor(x, [n], [1], [BLOCK])
    tl.store(y + tl.arange(0, BLOCK), block.load([0]))


@triton.jit
def never_launched(x):
    tl.store(x, 0.0)


def launch() -> None:
    x, y = (torch.empty(1000, device="meta") for _ in range(2))
    index = torch.empty(1000, dtype=torch.int32, device="meta")
    sound[(8,)](x, y, 1000, BLOCK=128)
    gather[(8,)](x, index, y, 1000, BLOCK=128)
    scatter[(8,)](x, index, y, 1000, BLOCK=128)
    pointer_select[(8,)](x, y, 500, BLOCK=128)
    inline_assembly[(1,)](x, y, BLOCK=64)
    too_large[(1,)](x, y, 1000, BLOCK=65536)
    newer_than_3_2[(1,)](x, y, 1000, BLOCK=128)
