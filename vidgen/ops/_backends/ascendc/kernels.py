# SPDX-License-Identifier: Apache-2.0
"""Each op on its kernels: what they refuse, and the arguments as they take them.

They want rows that are contiguous, and modulations per sample; shift, scale and gate may be the strided views of one
projection that DiT blocks make. A tensor of another layout is copied first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._registry import OPS, refuse_dtype
from . import _library


@dataclass(frozen=True)
class Kernel:
    """``refuses(*args)`` has the op's own reasons; ``call(*args)`` is for arguments that have elements."""

    op: str
    call: Callable[..., Any]
    refuses: Callable[..., str | None]

    def refuse(self, *args: Any) -> str | None:
        return _library.status or refuse_dtype(*args) or self.refuses(*args)

    def run(self, *args: Any) -> Any:
        if next(a for a in args if isinstance(a, Tensor)).numel() == 0:
            return _zeros(OPS[self.op].fake(*args))  # type: ignore[misc]
        return self.call(*args)


def _zeros(results: Any) -> Any:
    """Of arguments without elements: results without elements, and sums of nothing."""
    return results.zero_() if isinstance(results, Tensor) else tuple(t.zero_() for t in results)


def _kernels() -> Any:
    return torch.ops.vidgen_ascendc


@functools.cache
def _longest_row(op: str, dtype: torch.dtype) -> int:
    """Elements of the longest row that fits a core's unified buffer."""
    return int(_kernels().longest_row(op, dtype))


def _per_sample(*modulation: Tensor) -> str | None:
    if any(t.dim() == 3 for t in modulation):
        return "the kernel takes modulations per sample, not per token"
    return None


def _fits(op: str, x: Tensor) -> str | None:
    if x.shape[-1] > (limit := _longest_row(op, x.dtype)):
        return f"a row of {x.shape[-1]} channels is too long for the unified buffer, which takes {limit}"
    return None


def _rows(t: Tensor) -> Tensor:
    """A modulation (batch, channels) whose rows are contiguous."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _parameters(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in parameters)


def _adaln_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    return _kernels().adaln_modulate(x.contiguous(), _rows(shift), _rows(scale), *_parameters(weight, bias), eps)


def _adaln_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    rows = grad.contiguous(), x.contiguous(), _rows(scale)
    return _kernels().adaln_modulate_backward(*rows, *_parameters(weight, bias), eps)


def _gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Any:
    return _kernels().gated_residual(x.contiguous(), _rows(gate), y.contiguous())


def _gated_residual_backward(grad: Tensor, gate: Tensor, y: Tensor) -> Any:
    return _kernels().gated_residual_backward(grad.contiguous(), _rows(gate), y.contiguous())


def _gated_residual_adaln(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    rows = x.contiguous(), _rows(gate), y.contiguous(), _rows(shift), _rows(scale)
    return _kernels().gated_residual_adaln(*rows, *_parameters(weight, bias), eps)


def _gated_residual_adaln_backward(
    grad_h: Tensor,
    grad_modulated: Tensor,
    h: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    rows = grad_h.contiguous(), grad_modulated.contiguous(), h.contiguous(), _rows(gate), y.contiguous(), _rows(scale)
    return _kernels().gated_residual_adaln_backward(*rows, *_parameters(weight, bias), eps)


def _haar_3d(x: Tensor, filter_constant: float, repeat_first_frame: bool) -> Any:
    return _kernels().haar_3d(x.contiguous(), filter_constant, repeat_first_frame)


def _inverse_haar_3d(y: Tensor, filter_constant: float, drop_first_frame: bool) -> Any:
    return _kernels().inverse_haar_3d(y.contiguous(), filter_constant, drop_first_frame)


def _sections(sections: Sequence[int] | None) -> str | None:
    return None if sections is None or len(sections) <= 4 else f"the kernel takes 4 sections, not {len(sections)}"


def _heads(t: Tensor) -> Tensor:
    """(batch, tokens, heads, head_dim) where each token's heads lie together, as in a packed projection."""
    whole = (t.shape[3] == 1 or t.stride(3) == 1) and (t.shape[2] == 1 or t.stride(2) == t.shape[3])
    return t if whole else t.contiguous()


def _qk_norm_rope(
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
) -> Any:
    run, rotation = _kernels().qk_norm_rope, (*_parameters(cos, sin), style, sections, sparse_n)
    new_q = run(_heads(q), *_parameters(q_weight, q_bias), norm, eps, *rotation)
    new_k = run(_heads(k), *_parameters(k_weight, k_bias), norm, eps, *rotation)
    if v is None:
        return new_q, new_k, q.new_empty(0)
    return new_q, new_k, run(_heads(v), None, None, "none", 0.0, None, None, "half", None, sparse_n)


def _qk_norm_rope_backward(
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
) -> Any:
    rotation = *_parameters(cos, sin), style, sections, sparse_n
    return _kernels().qk_norm_rope_backward(grad.contiguous(), _heads(x), *_parameters(weight), norm, eps, *rotation)


KERNELS = {
    kernel.op: kernel
    for kernel in (
        Kernel(
            "adaln_modulate",
            _adaln_modulate,
            lambda x, shift, scale, *_: _per_sample(shift, scale) or _fits("adaln_modulate", x),
        ),
        Kernel(
            "adaln_modulate_backward",
            _adaln_modulate_backward,
            lambda grad, x, scale, *_: _per_sample(scale) or _fits("adaln_modulate_backward", x),
        ),
        Kernel("gated_residual", _gated_residual, lambda x, gate, y: _per_sample(gate)),
        Kernel("gated_residual_backward", _gated_residual_backward, lambda grad, gate, y: _per_sample(gate)),
        Kernel(
            "gated_residual_adaln",
            _gated_residual_adaln,
            lambda x, gate, y, shift, scale, *_: _per_sample(gate, shift, scale) or _fits("gated_residual_adaln", x),
        ),
        Kernel(
            "gated_residual_adaln_backward",
            _gated_residual_adaln_backward,
            lambda grad_h, grad_modulated, h, gate, y, scale, *_: (
                _per_sample(gate, scale) or _fits("gated_residual_adaln_backward", h)
            ),
        ),
        Kernel(
            "qk_norm_rope",
            _qk_norm_rope,
            lambda q, *rest: _sections(rest[-2]) or _fits("qk_norm_rope", q),
        ),
        Kernel(
            "qk_norm_rope_backward",
            _qk_norm_rope_backward,
            lambda grad, x, *rest: _sections(rest[-2]) or _fits("qk_norm_rope_backward", x),
        ),
        Kernel("haar_3d", _haar_3d, lambda *_: None),
        Kernel("inverse_haar_3d", _inverse_haar_3d, lambda *_: None),
    )
}
