# SPDX-License-Identifier: Apache-2.0
"""``rope_3d`` by npu_rotary_mul: halves of a head ("half") or neighbouring channels ("interleave").

Halves of sections are regrouped to halves of the head before and back after it, one copy each. Everything is in
float32, as the op's tables and its promise to round once are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _guards

NAME = "npu_rotary_mul"


def refuse(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> str | None:
    return _guards.available(NAME) or limits(x, cos, style)


def limits(x: Tensor, cos: Tensor, style: str) -> str | None:
    return _guards.rotary(x, style == "interleaved", as_one_sample=cos.dim() == 3)


def run(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    return rotated(x.float(), cos, sin, style, sections).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    """In float32, new and contiguous."""
    x, shape = x.contiguous(), x.shape
    if cos.dim() == 3:
        x, cos, sin = one_table(x), cos.flatten(0, 1), sin.flatten(0, 1)
    if style == "interleaved":
        tables = (t.float().repeat_interleave(2, -1)[None, :, None] for t in (cos, sin))
        return torch.ops.npu.npu_rotary_mul.default(x, *tables, rotary_mode="interleave").view(shape)
    tables = (torch.cat((t, t), -1).float()[None, :, None] for t in (cos, sin))
    x = x if sections is None else halves_of_head(x, sections)
    out = torch.ops.npu.npu_rotary_mul.default(x, *tables, rotary_mode="half")
    return (out if sections is None else halves_of_sections(out, sections)).view(shape)


def one_table(x: Tensor) -> Tensor:
    """Samples with tables of their own as one long sample: the documents want the batch of the tables to be 1."""
    return x.flatten(0, 1).unsqueeze(0)


def halves_of_head(x: Tensor, sections: Sequence[int]) -> Tensor:
    """First halves of all sections, then all second halves."""
    halves = [half for part in x.split(list(sections), -1) for half in part.chunk(2, -1)]
    return torch.cat(halves[0::2] + halves[1::2], -1)


def halves_of_sections(x: Tensor, sections: Sequence[int]) -> Tensor:
    """The inverse."""
    widths = [d // 2 for d in sections]
    first, second = (half.split(widths, -1) for half in x.chunk(2, -1))
    return torch.cat([half for pair in zip(first, second, strict=True) for half in pair], -1)
