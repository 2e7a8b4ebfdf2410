# SPDX-License-Identifier: Apache-2.0
"""Operators that nobody calls by name: parts of torch_npu's own autograd, and what it makes of PyTorch's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype)


def matmul_backward(grad: Tensor, a: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    left, right = a if a.dim() > 1 else a[None], b if b.dim() > 1 else b[:, None]
    if b.dim() == 1:
        grad = grad.unsqueeze(-1)
    if a.dim() == 1:
        grad = grad.unsqueeze(-2)
    of_a = (grad @ right.mT).sum_to_size(left.shape).view(a.shape) if wanted[0] else None
    of_b = (left.mT @ grad).sum_to_size(right.shape).view(b.shape) if wanted[1] else None
    return of_a, of_b


def repeat_interleave_backward(grad: Tensor, input: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    if dim is None:
        return grad.unflatten(0, (-1, repeats)).sum(1).view(input.shape)
    return grad.unflatten(dim, (-1, repeats)).sum(dim % input.dim() + 1)


def one_hot(t: Tensor, num_classes: int = -1) -> Tensor:
    classes = num_classes if num_classes >= 0 else int(t.max()) + 1
    return (t.unsqueeze(-1) == torch.arange(classes, device=t.device)).long()


_library = torch.library.Library("aten", "IMPL")


def replace_what_modes_do_not_see() -> None:
    """torch_npu launches these kernels where its autograd stands, which is above dispatch modes."""
    _library.impl("one_hot", one_hot, "AutogradPrivateUse1", allow_override=True)


def internals(reference: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Formulas for these operators, by those of documented ones."""

    # The third versions take lengths and return the state of dropout in tensors.

    def attention(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        *results, _, _, _ = reference["npu::npu_fusion_attention"](*args, **with_lists(kwargs))
        return (*results, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def attention_backward(*args: Any, seed: Tensor, offset: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        return reference["npu::npu_fusion_attention_grad"](*args, **with_lists(kwargs))

    return {
        "aten::matmul_backward": matmul_backward,
        "npu::repeat_interleave_backward_int": repeat_interleave_backward,
        "npu::_npu_dtype_cast": cast,
        "npu::_npu_dtype_cast_backward": cast,
        "npu::npu_fusion_attention_v3": attention,
        "npu::npu_fusion_attention_grad_v3": attention_backward,
    }


def with_lists(options: dict[str, Any]) -> dict[str, Any]:
    lengths = {
        name: options[name].tolist()
        for name in ("actual_seq_qlen", "actual_seq_kvlen")
        if isinstance(options.get(name), Tensor)
    }
    return {**options, **lengths}
