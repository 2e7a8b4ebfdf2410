# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding over frames, rows and columns, in the conventions of the four systems (arXiv 2104.09864).

The tables are the same for every convention: ``(sequence, head_dim / 2)``, one column per rotated pair, the pairs of
the time axis first, then rows, then columns. A convention (``style``) only says which two channels are a pair:

====================  ===========================================================  ========================
style                 channels of pair j                                           used by
====================  ===========================================================  ========================
``half_per_axis``     i and i + d/2 of the section of its axis, d channels wide    Open-Sora Plan 1.3, 1.5
``half``              j and j + head_dim/2                                         Open-Sora 2.0 (release)
``interleaved``       2j and 2j + 1                                                CogVideoX, Open-Sora 2.0
====================  ===========================================================  ========================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import describe, require_device, require_floating, wide
from ._draw import SMALL_SIZES, draw, strided
from ._registry import Choose, Cost, Op

STYLES = ("half_per_axis", "half", "interleaved")


def rope_3d_table(
    grid: Sequence[int | Tensor],
    sections: Sequence[int],
    *,
    theta: float = 10000.0,
    start: Sequence[int] = (0, 0, 0),
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    text_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``(start + n) / scale * theta ** (-2 i / d)``, for any style of :func:`rope_3d`.

    Args:
        grid: for each axis (frames, rows, columns) the number of positions n = 0, 1, ... or a 1-D tensor of the
            positions themselves (a cropped or resampled grid), to which ``start`` and ``scale`` still apply.
        sections: d of each axis: even channel counts that add up to head_dim. Open-Sora Plan 1.3 has head_dim/3 each,
            1.5 has head_dim/16 times (4, 6, 6), CogVideoX head_dim/8 times (2, 3, 3).
        theta: base of the frequencies.
        start: added to the positions of each axis.
        scale: divides the positions of each axis (the interpolation scale of Open-Sora Plan).
        text_tokens: rows of angle 0 (no rotation) in front, for text that shares the sequence.
        dtype: in which angles are computed; Open-Sora 2.0's interleaved table is made in float64.
        device: of the results.

    Returns:
        ``(cos, sin)``, each float32 ``(text_tokens + frames * rows * columns, head_dim / 2)``, tokens t-major.

    Raises:
        ValueError: not three axes, an odd section, a scale of 0 or a dtype other than float32 and float64.
    """
    for name, given in (("grid", grid), ("sections", sections), ("start", start), ("scale", scale)):
        if len(given) != 3:
            raise ValueError(f"rope_3d_table: {name} must have one entry for frames, rows, columns, got {given}")
    if any(d < 0 or d % 2 for d in sections):
        raise ValueError(f"rope_3d_table: sections must be even, got {tuple(sections)}")
    if any(s == 0 for s in scale):
        raise ValueError(f"rope_3d_table: scale must not be 0, got {tuple(scale)}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rope_3d_table: dtype must be float32 or float64, got {dtype}")
    parts = []
    for axis, (positions, d) in enumerate(zip(grid, sections, strict=True)):
        if not isinstance(positions, Tensor):
            positions = torch.arange(positions, device=device)
        if positions.dim() != 1:
            raise ValueError(f"rope_3d_table: positions must be 1-D, got {describe(positions)}")
        positions = (positions.to(device=device, dtype=dtype) + start[axis]) / scale[axis]
        exponents = torch.arange(0, d, 2, device=device, dtype=dtype) / max(d, 1)
        parts.append(positions[:, None] * (1.0 / theta**exponents))
    lengths = [len(part) for part in parts]
    spread = [
        part.view([-1 if i == axis else 1 for i in range(3)] + [part.shape[1]]).expand(*lengths, -1)
        for axis, part in enumerate(parts)
    ]
    angles = torch.cat(spread, -1).flatten(0, 2)
    angles = torch.cat((angles.new_zeros(text_tokens, angles.shape[1]), angles))
    return angles.cos().float(), angles.sin().float()


def split_pairs(x: Tensor, style: str, sections: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """First and second channels of all pairs, each (..., head_dim / 2), in the order of the tables."""
    if style == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    if style == "half":
        first, second = x.chunk(2, -1)
        return first, second
    halves = [half for part in x.split(list(sections or ()), -1) for half in part.chunk(2, -1)]
    return torch.cat(halves[0::2], -1), torch.cat(halves[1::2], -1)


def join_pairs(first: Tensor, second: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    if style == "interleaved":
        return torch.stack((first, second), -1).flatten(-2)
    if style == "half":
        return torch.cat((first, second), -1)
    widths = [d // 2 for d in sections or ()]
    halves = zip(first.split(widths, -1), second.split(widths, -1), strict=True)
    return torch.cat([half for pair in halves for half in pair], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    """The rotation itself, in the dtypes given; ``x`` (batch, sequence, heads, head_dim)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = split_pairs(x, style, sections)
    return join_pairs(first * cos - second * sin, second * cos + first * sin, style, sections)


def table_gradients(
    grad: Tensor, x: Tensor, cos: Tensor, style: str, sections: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin; tables are rarely learnt, so nothing here is fused."""
    g1, g2 = split_pairs(wide(grad), style, sections)
    x1, x2 = split_pairs(wide(x), style, sections)
    over = (0, 2) if cos.dim() == 2 else (2,)
    grad_cos, grad_sin = (g1 * x1 + g2 * x2).sum(over), (g2 * x1 - g1 * x2).sum(over)
    return grad_cos.to(cos.dtype), grad_sin.to(cos.dtype)


def check_rotation(op: str, x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> None:
    """Tables, style and sections must fit ``x`` (batch, sequence, heads, head_dim)."""
    batch, sequence, _, dim = x.shape
    if style not in STYLES:
        raise ValueError(f"{op}: style must be one of {STYLES}, got {style!r}")
    if dim % 2:
        raise ValueError(f"{op}: head_dim must be even, got {dim}")
    if (sections is not None) != (style == "half_per_axis"):
        raise ValueError(
            f"{op}: sections go with style 'half_per_axis' and with no other, got {sections} with {style!r}"
        )
    if sections is not None and (sum(sections) != dim or any(d < 0 or d % 2 for d in sections)):
        raise ValueError(f"{op}: sections must be even and add up to head_dim={dim}, got {tuple(sections)}")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("cos", cos), ("sin", sin)):
        shapes = {2: (sequence, dim // 2), 3: (batch, sequence, dim // 2)}
        if tuple(t.shape) != shapes.get(t.dim()) or t.dtype not in (torch.float32, exact):
            raise ValueError(f"{op}: {name} must be {shapes[2]} or {shapes[3]} of {exact}, got {describe(t)}")
        require_device(op, name, t, x)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"{op}: cos and sin must be alike, got {describe(cos)} and {describe(sin)}")


def check(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> None:
    require_floating("rope_3d", "x", x, 4, "(batch, sequence, heads, head_dim)")
    check_rotation("rope_3d", x, cos, sin, style, sections)


def reference(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    return rotate(wide(x), cos, sin, style, sections).to(x.dtype)


def fake(x: Tensor, cos: Tensor, sin: Tensor, style: str, sections: Sequence[int] | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.style, ctx.sections = inputs
    ctx.learnt = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if ctx.learnt else None, cos, sin)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin = ctx.saved_tensors
    grad_x = op(grad, cos, -sin, ctx.style, ctx.sections) if ctx.needs_input_grad[0] else None
    tables = table_gradients(grad, x, cos, ctx.style, ctx.sections) if ctx.learnt else (None, None)
    return (grad_x, *tables, None, None)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def tables(*shape: int) -> tuple[Tensor, Tensor]:
        angles = draw(shape, device, torch.float64)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return angles.cos().to(exact), angles.sin().to(exact)

    def new(*shape: int) -> Tensor:
        return draw(shape, device, dtype)

    packed = new(2, 3, 3, 2, 16)
    return [
        (new(1, 1, 1, 2), *tables(1, 1), "half", None),
        (packed[:, :, 1], *tables(3, 8), "half_per_axis", (4, 6, 6)),
        (new(1, 3, 2, 6), *tables(1, 3, 3), "half_per_axis", (2, 2, 2)),
        (new(1, 3, 2, 18), *tables(3, 9), "interleaved", None),
        (new(2, 3, 2, 34), *tables(3, 17), "half", None),
        (new(1, 2, 6, 3).transpose(2, 3), *tables(2, 3), "interleaved", None),
        (new(1, 2, 2, 64), *tables(2, 32), "half_per_axis", (16, 24, 24)),
        (new(0, 3, 2, 8), *tables(3, 4), "half", None),
    ]


def workloads(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Any, ...]]]:
    def new(dim: int, style: str, sections: tuple[int, ...]) -> tuple[Any, ...]:
        cos, sin = rope_3d_table((4, 32, 32), sections, device=device)
        x = draw((1, 4096, 24, dim), device, dtype)
        return x, cos, sin, style, sections if style == "half_per_axis" else None

    return {
        "1x4096x24x96 per axis": lambda: new(96, "half_per_axis", (32, 32, 32)),
        "1x4096x24x128 per axis": lambda: new(128, "half_per_axis", (32, 48, 48)),
        "1x4096x24x128 half": lambda: new(128, "half", (16, 56, 56)),
        "1x4096x24x64 interleaved": lambda: new(64, "interleaved", (16, 24, 24)),
    }


def random_rotation(
    choose: Choose, batch: int, sequence: int, device: torch.device
) -> tuple[tuple[int, ...], Tensor, Tensor, str, tuple[int, ...] | None]:
    """Sections of a head, tables and a style."""
    sections = choose(((2, 0, 0), (2, 2, 2), (4, 6, 6), (16, 24, 24), (22, 22, 22), (32, 48, 48), (2, 34, 0)))
    style = choose(STYLES)
    shape = (sequence, sum(sections) // 2)
    shape = choose((shape, (batch, *shape)))
    cos, sin = (strided(choose, shape, device, torch.float32) for _ in range(2))
    return sections, cos, sin, style, sections if style == "half_per_axis" else None


def random_args(choose: Choose, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, sequence, heads = choose(SMALL_SIZES), choose(SMALL_SIZES), choose(SMALL_SIZES)
    sections, *rotation = random_rotation(choose, batch, sequence, device)
    return strided(choose, (batch, sequence, heads, sum(sections)), device, dtype), *rotation


def cost(x: Tensor, *_: Any) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size())


op = Op(
    "rope_3d(Tensor x, Tensor cos, Tensor sin, str style, int[]? sections) -> Tensor",
    check,
    reference,
    samples,
    workloads,
    random_args,
    cost,
    fake=fake,
    save=save,
    backward=backward,
    out_shape=lambda x, *_: x.shape,
)


def rope_3d(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    style: str,
    sections: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate each pair (a, b) of channels to ``(a cos - b sin, b cos + a sin)``, computed in float32.

    Args:
        x: ``(batch, sequence, heads, head_dim)``, floating point, any strides.
        cos, sin: float32 ``(sequence, head_dim / 2)`` or ``(batch, sequence, head_dim / 2)``, from
            :func:`rope_3d_table` (float64 is legal with a float64 ``x``).
        style: which channels are a pair: ``"half_per_axis"``, ``"half"`` or ``"interleaved"``, see above.
        sections: with ``"half_per_axis"``: channels of each axis, as given to :func:`rope_3d_table`.
        out: contiguous tensor of ``x``'s shape and dtype to write into (no autograd).

    Returns:
        Contiguous tensor of ``x``'s shape and dtype.

    Raises:
        ValueError: shapes, dtypes, devices, style or sections do not fit.
    """
    args = (x, cos, sin, style, None if sections is None else tuple(sections))
    return op(*args) if out is None else op.into(out, *args)
