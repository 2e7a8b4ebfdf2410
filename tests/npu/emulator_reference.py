# SPDX-License-Identifier: Apache-2.0
"""What operators of torch_npu compute, as their documents say, in plain PyTorch on the CPU: the truth of the emulator.

``REFERENCE`` maps ``npu::<name>`` to a function with the operator's own signature. What is not modelled raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

REFERENCE: dict[str, Callable[..., Any]] = {}
FOREVER = 2147483647


def reference(function: Callable[..., Any]) -> Callable[..., Any]:
    REFERENCE[f"npu::{function.__name__}"] = function
    return function


def unsupported(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value} is not modelled")


# Attention. Inside, tensors are (batch, heads, sequence, head_dim).


def split_layout(t: Tensor, layout: str, heads: int) -> Tensor:
    if layout == "BNSD":
        return t
    if layout == "BSND":
        return t.transpose(1, 2)
    if layout == "BSH":
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)
    if layout == "SBH":
        return t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
    raise NotImplementedError(f"input_layout={layout} is not modelled")


def join_layout(t: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return t.contiguous()
    if layout == "BSND":
        return t.transpose(1, 2).contiguous()
    if layout == "BSH":
        return t.transpose(1, 2).flatten(2).contiguous()
    return t.permute(2, 0, 1, 3).flatten(2).contiguous()


def takes_part(queries: int, keys: int, mask: Tensor | None, sparse_mode: int, before: int, after: int) -> Tensor:
    """(..., queries, keys), True where a score counts. In the mask given, 1 means that it is dropped."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    if mask is None:  # documented: sparse_mode and the two distances are then ignored
        return torch.ones(queries, keys, dtype=torch.bool)
    if sparse_mode == 0:
        return (j >= i - before) & (j <= i + after) & ~mask.bool()
    if sparse_mode == 1:
        return ~mask.bool()
    if sparse_mode == 2:  # causal, aligned at the upper left
        return j <= i
    if sparse_mode == 3:  # causal, aligned at the lower right
        return j - (keys - queries) <= i
    if sparse_mode == 4:  # band, aligned at the lower right
        return (j - (keys - queries) >= i - before) & (j - (keys - queries) <= i + after)
    raise NotImplementedError(f"sparse_mode={sparse_mode} is not modelled")


def scores(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, sparse_mode: int, before: int, after: int
) -> Tensor:
    s = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    return s.masked_fill(~takes_part(q.shape[2], k.shape[2], mask, sparse_mode, before, after), float("-inf"))


def lanes(t: Tensor) -> Tensor:
    return t.expand(*t.shape[:-1], 8).contiguous()


@reference
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = FOREVER,
    next_tockens: int = FOREVER,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    unsupported(pse=pse, prefix=prefix, sink=sink, keep_prob=None if keep_prob == 1 else keep_prob)
    if input_layout == "TND":
        assert actual_seq_qlen is not None and actual_seq_kvlen is not None
        outputs, q0, k0 = [], 0, 0
        for q1, k1 in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            o, maximum, total = npu_fusion_attention(
                query[None, q0:q1],
                key[None, k0:k1],
                value[None, k0:k1],
                head_num,
                "BSND",
                atten_mask=atten_mask,
                scale=scale,
                pre_tockens=pre_tockens,
                next_tockens=next_tockens,
                sparse_mode=sparse_mode,
            )[:3]
            outputs.append((o[0], order(maximum[0], softmax_layout), order(total[0], softmax_layout)))
            q0, k0 = q1, k1
        o, maximum, total = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return o, maximum.contiguous(), total.contiguous(), query.new_empty(0), 0, 0, 0
    kv_heads = head_num if input_layout in ("BNSD", "BSND") else key.shape[-1] // (query.shape[-1] // head_num)
    q = split_layout(query, input_layout, head_num)
    k, v = (split_layout(t, input_layout, kv_heads) for t in (key, value))
    s = scores(q, k, scale, atten_mask, sparse_mode, pre_tockens, next_tockens)
    maximum = s.amax(-1, keepdim=True)
    e = torch.exp(s - maximum)
    total = e.sum(-1, keepdim=True)
    o = ((e / total) @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)).to(query.dtype)
    return join_layout(o, input_layout), lanes(maximum), lanes(total), query.new_empty(0), 0, 0, 0


def order(statistics: Tensor, softmax_layout: str) -> Tensor:
    """One sequence's (N, S, 8) as it lies in (T, N, 8): by heads first, unless the layout is said to be TND."""
    if softmax_layout == "TND":
        return statistics.transpose(0, 1)
    return statistics.contiguous().view(statistics.shape[1], statistics.shape[0], 8)


def heads_first(statistics: Tensor, softmax_layout: str) -> Tensor:
    """The inverse, (1, N, S, 8)."""
    if softmax_layout == "TND":
        return statistics.transpose(0, 1)[None]
    return statistics.contiguous().view(1, statistics.shape[1], statistics.shape[0], 8)


@reference
def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = FOREVER,
    next_tockens: int = FOREVER,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Any, ...]:
    unsupported(pse=pse, prefix=prefix, sink=sink, keep_prob=None if keep_prob == 1 else keep_prob)
    assert attention_in is not None and softmax_max is not None and softmax_sum is not None
    if input_layout == "TND":
        assert actual_seq_qlen is not None and actual_seq_kvlen is not None
        gradients, q0, k0 = [], 0, 0
        for q1, k1 in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            one = npu_fusion_attention_grad(
                *(query[None, q0:q1], key[None, k0:k1], value[None, k0:k1], dy[None, q0:q1], head_num, "BSND"),
                atten_mask=atten_mask,
                softmax_max=heads_first(softmax_max[q0:q1], softmax_layout),
                softmax_sum=heads_first(softmax_sum[q0:q1], softmax_layout),
                attention_in=attention_in[None, q0:q1],
                scale_value=scale_value,
                pre_tockens=pre_tockens,
                next_tockens=next_tockens,
                sparse_mode=sparse_mode,
            )
            gradients.append([g[0] for g in one[:3]])
            q0, k0 = q1, k1
        joined = [torch.cat(parts) for parts in zip(*gradients, strict=True)]
        return (*joined, query.new_empty(0), query.new_empty(0))
    q, k, v, g, o = (split_layout(t, input_layout, head_num).float() for t in (query, key, value, dy, attention_in))
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("the gradient of grouped queries is not modelled")
    s = scores(q, k, scale_value, atten_mask, sparse_mode, pre_tockens, next_tockens)
    p = torch.exp(s - softmax_max[..., :1]) / softmax_sum[..., :1]
    dv = p.transpose(-1, -2) @ g
    ds = p * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale_value
    gradients = [join_layout(t, input_layout).to(query.dtype) for t in (ds @ k, ds.transpose(-1, -2) @ q, dv)]
    return (*gradients, query.new_empty(0), query.new_empty(0))


@reference
def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    *,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    if input_layout != "SBH" or input_softmax_layout:
        raise NotImplementedError(f"input_layout={input_layout} is not modelled")
    maximum = torch.maximum(prev_softmax_max, cur_softmax_max)
    previous = prev_softmax_sum * torch.exp(prev_softmax_max - maximum)
    current = cur_softmax_sum * torch.exp(cur_softmax_max - maximum)
    total = previous + current
    heads = maximum.shape[1]

    def weighted(out: Tensor, mass: Tensor) -> Tensor:  # statistics are (B, N, S, 8), the output (S, B, N * D)
        return out.float().unflatten(-1, (heads, -1)) * (mass / total)[..., 0].permute(2, 0, 1)[..., None]

    merged = weighted(prev_attn_out, previous) + weighted(cur_attn_out, current)
    return merged.flatten(-2).to(prev_attn_out.dtype), maximum, total


# Rotary embedding


def turned(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)
    if mode == "interleave":
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    raise NotImplementedError(f"rotary_mode={mode} is not modelled")


def turned_back(x: Tensor, mode: str) -> Tensor:
    return -turned(x, mode)  # a quarter turn: its transpose is its negative


@reference
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    x = input.float()
    return (x * r1.float() + turned(x, rotary_mode) * r2.float()).to(input.dtype)


@reference
def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    g, x = grad.float(), input.float()
    dx = g * r1.float() + turned_back(g * r2.float(), rotary_mode)
    d1 = (g * x).sum_to_size(r1.shape).to(r1.dtype)
    d2 = (g * turned(x, rotary_mode)).sum_to_size(r2.shape).to(r2.dtype)
    return dx.to(input.dtype), d1, d2


# Norms and activations


@reference
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    x, dims = input.float(), list(range(input.dim() - gamma.dim(), input.dim()))
    rstd = torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


@reference
def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    leading = list(range(input.dim() - gamma.dim()))
    dims = list(range(len(leading), input.dim()))
    x, g = input.float(), dy.float()
    weighted = g * gamma.float()
    dx = rstd * weighted - x * rstd.pow(3) * (weighted * x).mean(dims, keepdim=True)
    return dx.to(input.dtype), (g * x * rstd).sum(leading)


@reference
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    a, b = input.float().chunk(2, dim)
    return (F.silu(a) * b).to(input.dtype)


@reference
def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(input, approximate=approximate)


@reference
def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu_backward(grad_output, input, approximate=approximate)


@reference
def npu_group_norm_swish(
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float | None = 1e-5,
    swish_scale: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    assert eps is not None and swish_scale is not None
    groups = input.float().reshape(input.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(groups, -1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    normalised = ((groups - mean[..., None]) * rstd[..., None]).view(input.shape)
    z = normalised * channels(weight, input) + channels(bias, input)
    y = z * torch.sigmoid(swish_scale * z)
    return y.to(input.dtype), mean.to(input.dtype), rstd.to(input.dtype)


def channels(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.float().view(-1, *[1] * (x.dim() - 2))


@reference
def npu_group_norm_swish_grad(
    grad: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_input_mask: Sequence[bool],
    swish_scale: float | None = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """With the statistics that were given, so that wrong ones show."""
    assert swish_scale is not None
    groups = input.float().reshape(input.shape[0], num_groups, -1)
    normalised = ((groups - mean.float()[..., None]) * rstd.float()[..., None]).view(input.shape)
    z = normalised * channels(weight, input) + channels(bias, input)
    sigmoid = torch.sigmoid(swish_scale * z)
    through = grad.float() * sigmoid * (1 + swish_scale * z * (1 - sigmoid))
    rest = [d for d in range(input.dim()) if d != 1]
    inner = (through * channels(weight, input)).reshape(groups.shape)
    n = normalised.reshape(groups.shape)
    dx = rstd.float()[..., None] * (inner - inner.mean(-1, keepdim=True) - n * (inner * n).mean(-1, keepdim=True))
    results = (dx.view(input.shape), (through * normalised).sum(rest), through.sum(rest))
    wanted = zip(results, grad_input_mask, strict=True)
    return tuple(t.to(input.dtype) if asked else input.new_empty(0) for t, asked in wanted)  # type: ignore[return-value]


@reference
def npu_layer_norm_eval(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(input, normalized_shape, weight, bias, eps)
