# SPDX-License-Identifier: Apache-2.0
"""What each op is compared with: its eager formulation, as the original systems write it in plain PyTorch.

An original takes what its op takes; :func:`bind` joins it to arguments, so that what the original systems prepare once
and not in every call (filters, position tables) is prepared outside of what is timed. The original of a gradient is
autograd through the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[], Any]


@dataclass(frozen=True)
class Original:
    """``run(*prepare(*args))`` gives what the op gives for ``args``.

    With ``upstream``, the op is a gradient: what counts is autograd through ``run`` from ``upstream(*args)`` to the
    inputs at ``wrt``, which stand in the order of the op's results; those that are None are left out.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] = lambda *args: args
    upstream: Callable[..., tuple[Tensor, ...]] | None = None
    wrt: tuple[int, ...] = ()


def bind(original: Original, args: tuple[Any, ...], transform: Callable[[Any], Any] = lambda run: run) -> Step:
    """The call to be timed; ``transform`` is torch.compile or nothing."""
    run, inputs = transform(original.run), list(original.prepare(*args))
    if original.upstream is None:
        return lambda: run(*inputs)
    for i in original.wrt:
        inputs[i] = None if inputs[i] is None else inputs[i].detach().requires_grad_()
    leaves = [inputs[i] for i in original.wrt if inputs[i] is not None]
    grads = original.upstream(*args)
    with torch.enable_grad():
        result = run(*inputs)

    def gradients() -> list[Tensor | None]:
        found = iter(torch.autograd.grad(result, leaves, grads, retain_graph=True))
        return [None if inputs[i] is None else next(found) for i in original.wrt]

    return gradients


def relative_error(original: Any, ours: Any) -> float:
    """Largest ``|original - ours| / |ours|`` over the results, as vectors; what the original lacks does not count."""
    errors = [0.0]
    for a, b in zip(_results(original), _results(ours), strict=True):
        if a is not None and b is not None and a.numel():
            errors.append(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item())
    return float(torch.tensor(errors).max())  # unlike max(), sees NaN


def tolerance(dtype: torch.dtype) -> float:
    """How far an original, which rounds after every step, may be from its op, which rounds once."""
    return {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]


def _results(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


# Modulation and gated residual of DiT blocks


def rows(t: Tensor) -> Tensor:
    return t[:, None] if t.dim() == 2 else t


def adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + rows(scale)) + rows(shift)


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + rows(gate) * y


def gated_residual_adaln(x: Tensor, gate: Tensor, y: Tensor, *modulation: Any) -> tuple[Tensor, Tensor]:
    h = gated_residual(x, gate, y)
    return h, adaln_modulate(h, *modulation)


# Rotary embedding, and the normalisation before it


def rotation(cos: Tensor, sin: Tensor, style: str, sections: Any) -> tuple[list[Tensor], list[Tensor], list[int], bool]:
    """Tables as the systems hold them, one entry per channel, in parts that are rotated by themselves."""
    interleaved = style == "interleaved"
    widths = list(sections) if sections else [2 * cos.shape[-1]]

    def spread(table: Tensor) -> list[Tensor]:
        parts = table.split([d // 2 for d in widths], -1)
        full = [part.repeat_interleave(2, -1) if interleaved else torch.cat((part, part), -1) for part in parts]
        return [part.unsqueeze(-2) for part in full]

    return spread(cos), spread(sin), widths, interleaved


def rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        first, second = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
        return torch.stack((-second, first), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope_3d(x: Tensor, cos: list[Tensor], sin: list[Tensor], widths: list[int], interleaved: bool) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = [
        (part.to(wide) * c + rotate_half(part.to(wide), interleaved) * s).to(x.dtype)
        for part, c, s in zip(x.split(widths, -1), cos, sin, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


def to_groups(x: Tensor, sparse_n: int, pattern: str) -> Tensor:
    """(batch, tokens, ...) to (batch, sparse_n, places, ...), by copies, tokens padded with zeros."""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % sparse_n**2))
    if pattern == "single":
        return x.unflatten(1, (x.shape[1] // sparse_n, sparse_n)).transpose(1, 2).contiguous()
    return x.unflatten(1, (x.shape[1] // sparse_n**2, sparse_n, sparse_n)).transpose(1, 2).flatten(2, 3)


def from_groups(x: Tensor, tokens: int, pattern: str) -> Tensor:
    if pattern == "group":
        x = x.unflatten(2, (x.shape[2] // x.shape[1], x.shape[1]))
    return x.transpose(1, 2).flatten(1, 2 if pattern == "single" else 3)[:, :tokens]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    tables: Any,
    sparse_n: int,
) -> tuple[Tensor | None, ...]:
    q = one_norm_rope(q, q_weight, q_bias, norm, eps, tables, sparse_n)
    k = one_norm_rope(k, k_weight, k_bias, norm, eps, tables, sparse_n)
    return q, k, None if v is None else to_groups(v, sparse_n, "group").flatten(1, 2) if sparse_n > 1 else v


def one_norm_rope(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float, tables: Any, sparse_n: int
) -> Tensor:
    x = head_norm(x, weight, bias, norm, eps)
    x = x if tables is None else rope_3d(x, *tables)
    return to_groups(x, sparse_n, "group").flatten(1, 2) if sparse_n > 1 else x


def with_tables(*args: Any) -> tuple[Any, ...]:
    *others, cos, sin, style, sections, sparse_n = args
    return *others, None if cos is None else rotation(cos, sin, style, sections), sparse_n


def one_with_tables(grad: Tensor, x: Tensor, weight: Tensor | None, norm: str, *rest: Any) -> tuple[Any, ...]:
    bias = x.new_zeros(x.shape[-1]) if norm == "layer" else None
    return with_tables(x, weight, bias, norm, *rest)


# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if mask is not None and mask.dim() < 4:
        mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def attention_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention keeps the log-sum-exp to itself."""
    if mask is not None and mask.dim() < 4:
        mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """As ring-flash-attention writes it: out_a - sigmoid(lse_b - lse_a) * (out_a - out_b)."""
    weight = torch.sigmoid(lse_b - lse_a).transpose(1, 2).unsqueeze(-1)
    a, b = out_a.to(lse_a.dtype), out_b.to(lse_a.dtype)
    out = a - weight * (a - b)
    return out.to(out_a.dtype), lse_a - F.logsigmoid(lse_a - lse_b)


def skiparse_attention(
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
) -> list[Tensor]:
    """Groups folded into samples, the text copied to each group and averaged at the end."""
    batch, tokens = q.shape[:2]
    out = attention(*joint_groups(q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask), scale)
    out = out.unflatten(0, (batch, sparse_n))
    places = -(-tokens // sparse_n**2) * sparse_n
    visual = from_groups(out[:, :, :places], tokens, pattern)
    return [visual] if text_q is None else [visual, out[:, :, places:].mean(1)]


def joint_groups(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask of all groups, each a sample of its own."""
    batch, tokens = q.shape[:2]

    def joint(visual: Tensor, text: Tensor | None) -> Tensor:
        visual = to_groups(visual, sparse_n, pattern).flatten(0, 1)
        return visual if text is None else torch.cat((visual, text.repeat_interleave(sparse_n, 0)), 1)

    if mask is not None or text_mask is not None or tokens % sparse_n**2:
        shown = torch.ones(batch, tokens, dtype=torch.bool, device=q.device) if mask is None else mask
        if text_mask is None and text_k is not None:
            text_mask = torch.ones(text_k.shape[:2], dtype=torch.bool, device=q.device)
        mask = joint(shown, text_mask)
    return joint(q, text_q), joint(k, text_k), joint(v, text_v), mask


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
) -> tuple[Tensor, ...]:
    """The same groups, with all scores of each held for the log-sum-exp."""
    args = q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask, scale, grouped, num_tokens
    q, k, v, *_ = in_token_order(*args)
    joint = joint_groups(q, k, v, sparse_n, pattern, text_q, text_k, text_v, mask, text_mask)
    out, lse = (t.unflatten(0, (q.shape[0], sparse_n)) for t in attention_lse(*joint, scale))
    places = -(-num_tokens // sparse_n**2) * sparse_n
    visual = from_groups(out[:, :, :places], num_tokens, pattern)
    visual_lse = from_groups(lse[..., :places].transpose(2, 3), num_tokens, pattern).transpose(1, 2)
    return visual, visual_lse, out[:, :, places:], lse[..., places:]


def skiparse_groups(x: Tensor, text: Tensor | None, sparse_n: int, pattern: str) -> Tensor:
    groups = to_groups(x, sparse_n, pattern)
    return groups if text is None else torch.cat((groups, text[:, None].repeat(1, sparse_n, 1, 1, 1)), 2)


def in_token_order(q: Tensor, k: Tensor, v: Tensor, sparse_n: int, *rest: Any) -> tuple[Any, ...]:
    *rest, grouped, tokens = rest  # type: ignore[assignment]
    if grouped:
        q, k, v = (from_groups(t.unflatten(1, (sparse_n, -1)), tokens, "group").contiguous() for t in (q, k, v))
    return q, k, v, sparse_n, *rest


# Video autoencoders


def taps(dims: int, filter_constant: float, like: Tensor) -> list[Tensor]:
    """The 2 x 2 (x 2) filters, the sign of the last dimension flipping fastest."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    filters = []
    for flips in itertools.product((False, True), repeat=dims):
        grid = torch.full((2,) * dims, filter_constant, dtype=torch.float64)
        for dim, flip in enumerate(flips):
            grid = grid * signs.view([2 if d == dim else 1 for d in range(dims)]) if flip else grid
        filters.append(grid[None, None].to(like))
    return filters if dims == 3 else [filters[i] for i in (0, 2, 1, 3)]


def haar_3d(x: Tensor, filters: list[Tensor], repeat_first_frame: bool) -> Tensor:
    batch, channels = x.shape[:2]
    x = x.reshape(batch * channels, 1, *x.shape[2:])
    bands = []
    for kernel in filters:
        padded = torch.cat((x[:, :, :1], x), 2) if repeat_first_frame else x
        band = F.conv3d(padded, kernel, stride=2)
        bands.append(band.reshape(batch, channels, *band.shape[2:]))
    return torch.cat(bands, 1)


def inverse_haar_3d(y: Tensor, filters: list[Tensor], drop_first_frame: bool) -> Tensor:
    batch, channels = y.shape[0], y.shape[1] // 8
    parts = [band.reshape(batch * channels, 1, *y.shape[2:]) for band in y.chunk(8, 1)]
    video = F.conv_transpose3d(parts[0], filters[0], stride=2)
    for part, kernel in zip(parts[1:], filters[1:], strict=True):
        video = video + F.conv_transpose3d(part, kernel, stride=2)
    return video.reshape(batch, channels, *video.shape[2:])[:, :, int(drop_first_frame) :]


def haar_2d(x: Tensor, filters: list[Tensor]) -> Tensor:
    images = x.reshape(-1, 1, *x.shape[-2:])
    bands = [F.conv2d(images, kernel, stride=2) for kernel in filters]
    return torch.cat([band.reshape(*x.shape[:-2], *band.shape[-2:]) for band in bands], 1)


def inverse_haar_2d(y: Tensor, filters: list[Tensor]) -> Tensor:
    bands = y.chunk(4, 1)
    parts = [band.reshape(-1, 1, *y.shape[-2:]) for band in bands]
    images = F.conv_transpose2d(parts[0], filters[0], stride=2)
    for part, kernel in zip(parts[1:], filters[1:], strict=True):
        images = images + F.conv_transpose2d(part, kernel, stride=2)
    return images.reshape(*bands[0].shape[:-2], *images.shape[-2:])


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def layer_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, eps).movedim(-1, 1))


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    spatial_padding: tuple[int, ...],
    cache: Tensor | None,
) -> Tensor:
    front = x[:, :, :1].repeat(1, 1, (weight.shape[2] - 1) * dilation[0], 1, 1) if cache is None else cache
    return F.conv3d(torch.cat((front, x), 2), weight, bias, stride, (0, *spatial_padding), dilation)


def with_taps(dims: int) -> Callable[..., tuple[Any, ...]]:
    return lambda x, filter_constant, *edge: (x, taps(dims, filter_constant, x), *edge)


ORIGINALS = {
    "adaln_modulate": Original(adaln_modulate),
    "adaln_modulate_backward": Original(
        adaln_modulate,
        prepare=lambda grad, x, scale, *rest: (x, x.new_zeros(x.shape[0], x.shape[2]), scale, *rest),
        upstream=lambda grad, *_: (grad,),
        wrt=(0, 1, 2, 3, 4),
    ),
    "attention": Original(attention),
    "attention_backward": Original(
        attention,
        prepare=lambda grad, q, k, v, out, lse, *rest: (q, k, v, *rest),
        upstream=lambda grad, *_: (grad,),
        wrt=(0, 1, 2),
    ),
    "attention_lse": Original(attention_lse),
    "causal_conv3d": Original(causal_conv3d),
    "gated_residual": Original(gated_residual),
    "gated_residual_adaln": Original(gated_residual_adaln),
    "gated_residual_adaln_backward": Original(
        gated_residual_adaln,
        prepare=lambda grad_h, grad_modulated, h, gate, y, *rest: (
            (h - rows(gate) * y, gate, y, h.new_zeros(h.shape[0], h.shape[2]), *rest)
        ),
        upstream=lambda grad_h, grad_modulated, *_: (grad_h, grad_modulated),
        wrt=(0, 1, 2, 3, 4, 5, 6),
    ),
    "gated_residual_backward": Original(
        gated_residual,
        prepare=lambda grad, gate, y: (torch.zeros_like(y), gate, y),
        upstream=lambda grad, *_: (grad,),
        wrt=(1, 2),
    ),
    "gelu": Original(lambda x, approximate: F.gelu(x, approximate=approximate)),
    "group_norm_silu": Original(group_norm_silu),
    "group_norm_silu_backward": Original(
        group_norm_silu, prepare=lambda grad, *rest: rest, upstream=lambda grad, *_: (grad,), wrt=(0, 2, 3)
    ),
    "haar_2d": Original(haar_2d, prepare=with_taps(2)),
    "haar_3d": Original(haar_3d, prepare=with_taps(3)),
    "inverse_haar_2d": Original(inverse_haar_2d, prepare=with_taps(2)),
    "inverse_haar_3d": Original(inverse_haar_3d, prepare=with_taps(3)),
    "layer_norm_silu": Original(layer_norm_silu),
    "layer_norm_silu_backward": Original(
        layer_norm_silu, prepare=lambda grad, *rest: rest, upstream=lambda grad, *_: (grad,), wrt=(0, 1, 2)
    ),
    "merge_attention": Original(merge_attention),
    "qk_norm_rope": Original(qk_norm_rope, prepare=with_tables),
    "qk_norm_rope_backward": Original(
        one_norm_rope, prepare=one_with_tables, upstream=lambda grad, *_: (grad,), wrt=(0, 1, 2)
    ),
    "rope_3d": Original(rope_3d, prepare=lambda x, *rest: (x, *rotation(*rest))),
    "skiparse_attention": Original(skiparse_attention, prepare=in_token_order),
    "skiparse_attention_lse": Original(skiparse_attention_lse),
    "skiparse_attention_lse_backward": Original(
        skiparse_attention_lse,
        prepare=lambda *args: args[4:-4],
        upstream=lambda *args: args[:4],
        wrt=(0, 1, 2, 5, 6, 7),
    ),
    "skiparse_groups": Original(skiparse_groups),
}
