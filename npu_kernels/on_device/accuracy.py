# SPDX-License-Identifier: Apache-2.0
"""How far results may be from the truth: the rules of the tests of ops, for results of any device.

Truth is the op's reference in float64 on the CPU; what is allowed follows from the error of the same reference in the
op's own dtype, also on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Verdict:
    """The worst of the results of one call; ``why`` is empty where every one is within its bound."""

    error: float = 0.0
    bound: float = 0.0
    why: str = ""

    def add(self, number: int, error: float, bound: float) -> None:
        if not error <= bound and not self.why:  # also where the error is NaN
            self.why = f"result {number} is off by {error:.3g}, allowed are {bound:.3g}"
        if self.bound == 0 or not error / max(bound, 1e-300) <= self.error / max(self.bound, 1e-300):
            self.error, self.bound = error, bound


def tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [v for v in values if isinstance(v, Tensor)]


def mapped(change: Callable[[Tensor], Tensor], args: Sequence[Any]) -> tuple[Any, ...]:
    """``args`` with every floating-point tensor changed."""
    return tuple(change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def on_cpu(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.detach().cpu() if isinstance(a, Tensor) else a for a in args)


def judge_values(op: Any, args: Sequence[Any], results: Any, rounded_to: torch.dtype | None = None) -> Verdict:
    """``results`` of ``op(*args)``: at most twice the error of eager and one rounding; gradients three times and two.

    Where a result exceeds that, eager's error is the largest on inputs that are one float32 rounding off, plus how far
    these move the truth: see the tests of ops for why. ``rounded_to`` is the dtype that results went through.
    """
    factor, roundings = (3.0, 2.0) if op.name.endswith("_backward") else (2.0, 1.0)
    args, results = on_cpu(args), [y.detach().cpu() for y in tensors(results)]
    truth, eager = tensors(op.reference(*mapped(Tensor.double, args))), tensors(op.reference(*args))
    verdict = Verdict()
    if len(results) != len(truth):
        verdict.why = f"{len(results)} results instead of {len(truth)}"
    for i, (y, e, t) in enumerate(zip(results, eager, truth, strict=False)):
        if y.shape != t.shape or y.dtype != e.dtype:
            verdict.why = f"result {i} is {tuple(y.shape)} of {y.dtype} instead of {tuple(t.shape)} of {e.dtype}"
        elif not y.is_floating_point():
            verdict.add(i, float((y != t).sum()), 0.0)
        elif not torch.equal(y.isfinite(), e.isfinite()):
            verdict.why = f"result {i} is finite where eager is not, or the reverse"
        elif y.numel():
            finite = t.isfinite()
            slack = roundings * torch.finfo(rounded_to or e.dtype).eps * max(largest(t[finite]), 1.0)
            error, allowed = largest((y.double() - t)[finite]), largest((e.double() - t)[finite])
            if error > factor * allowed + slack:
                errors, moves = on_neighbours(op, args, truth)
                allowed, slack = max(allowed, errors[i]), slack + moves[i]
            verdict.add(i, error, factor * allowed + slack)
    return verdict


def on_neighbours(op: Any, args: Sequence[Any], truth: list[Tensor]) -> tuple[list[float], list[float]]:
    """For each result, at inputs off by a rounding of float32: eager's largest error, and how far the truth moves."""
    signs, eps = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps

    def off(a: Tensor) -> Tensor:
        return (a.double() * (1 + eps * (2 * torch.randint(2, a.shape, generator=signs) - 1))).to(a.dtype)

    errors, moves = [0.0] * len(truth), [0.0] * len(truth)
    for _ in range(3):
        near = mapped(off, args)
        there = tensors(op.reference(*mapped(Tensor.double, near)))
        for i, (e, n, t) in enumerate(zip(tensors(op.reference(*near)), there, truth, strict=True)):
            errors[i] = max(errors[i], largest((e.double() - n).nan_to_num(0)))
            moves[i] = max(moves[i], largest((n.double() - t).nan_to_num(0)))
    return errors, moves


def judge_gradients(op: Any, args: Sequence[Any], run: Callable[..., Any]) -> Verdict:
    """Gradients of ``run(*args)``: at most three times the error of autograd through eager, and two roundings."""
    local = on_cpu(args)
    truth = gradients(op.reference, mapped(Tensor.double, local))
    eager, ours = gradients(op.reference, local), gradients(run, args)
    verdict = Verdict()
    for i, (y, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        if (y is None) != (t is None):
            verdict.why = f"gradient {i} is missing, or there is one too many"
        elif y is not None and y.numel():
            error, allowed = largest(y.cpu().double() - t), largest(e.double() - t)
            verdict.add(i, error, 3 * allowed + 2 * torch.finfo(y.dtype).eps * max(largest(t), 1.0))
    return verdict


def gradients(run: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
    """Of a fixed random combination of the results, with respect to every floating-point argument."""
    args = mapped(lambda a: a.detach().clone().requires_grad_(), args)
    out = [y for y in tensors(run(*args)) if y.requires_grad]
    draw = torch.Generator().manual_seed(0)
    # Eighths are exact in every dtype, so that the truth in float64 begins with the same numbers.
    seeds = [(torch.randint(-16, 17, y.shape, generator=draw) / 8).to(y.device, y.dtype) for y in out]
    leaves = [a for a in tensors(args) if a.requires_grad]
    return torch.autograd.grad(out, leaves, seeds, allow_unused=True)


def largest(t: Tensor) -> float:
    return float(t.double().abs().amax()) if t.numel() else 0.0
