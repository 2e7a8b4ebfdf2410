# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping whose threshold follows the recent gradient norms (Open-Sora Plan v1.5, ``clip_grads.py``).

Both variants keep an average and a variance of the norm; a norm above ``average + 3 * sqrt(variance)`` is abnormal.
They differ in what happens then: ``AdaptiveGradientClipping`` scales the gradients down (or skips the step),
``PerRankGradientClipping`` drops the contribution of the ranks concerned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.parallel.layout import Layout
from vidgen.parallel.sharding import is_cut, local

EXTREME_NORM = 5.0  # a norm below this never counts as extreme, however calm the steps before it


@dataclass(frozen=True)
class ClippingResult:
    """What one call saw and did.

    Attributes:
        norm: gradient norm before, over all ranks.
        norm_after: norm of the gradients as they now stand.
        threshold: largest norm regarded as normal; None on the first step.
        coefficient: ``norm / threshold`` where gradients were scaled, else 1; for ``PerRankGradientClipping`` the
            fraction of normal ranks.
        finite: False if the norm is NaN or infinite.
        extreme: the norm is not finite, or far beyond the threshold.
        skip: the optimizer step must not be taken.
        stop: the original ends the run here.
    """

    norm: float
    norm_after: float
    threshold: float | None
    coefficient: float = 1.0
    finite: bool = True
    extreme: bool = False
    skip: bool = False
    stop: bool = False


class _NormStatistics:
    """Average and variance of the normal norms; both are saved, where the original forgets them on resume."""

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"{type(self).__name__}: decay must lie in (0, 1), got {decay}")
        self.decay = decay
        self.average: float | None = None
        self.variance = 0.0
        self.extreme_seen = False

    def threshold(self) -> float:
        if self.average is None:
            raise RuntimeError("threshold: no step has been seen yet")
        return self.average + 3 * math.sqrt(self.variance)

    def observe(self, norm: float) -> None:
        if self.average is None:
            raise RuntimeError("observe: no step has been seen yet")
        self.average = self.decay * self.average + (1 - self.decay) * norm
        self.variance = self.decay * self.variance + (1 - self.decay) * (self.average - norm) ** 2

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "variance": self.variance, "extreme_seen": self.extreme_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``'s answer.

        Raises:
            ValueError: other keys than those.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: wanted {', '.join(self.state_dict())}, got {', '.join(state)}"
            )
        self.average, self.variance = state["average"], state["variance"]
        self.extreme_seen = state["extreme_seen"]


class AdaptiveGradientClipping(_NormStatistics):
    """Scale gradients down to a threshold that follows their norm: the variant of the released recipe.

    With g the global L2 norm, decay delta, average a and variance v:

    1. First step: ``a = min(3*g, 1)``, ``v = 0``, nothing is clipped.
    2. Later ``threshold = a + 3*sqrt(v)`` and ``limit = max(a + 5*sqrt(v), 5)``.

       * ``g <= threshold``: nothing is clipped; ``a = delta*a + (1-delta)*g``, then with the new a
         ``v = delta*v + (1-delta)*(a-g)^2``.
       * ``threshold < g <= limit``: gradients times ``1 / (g/threshold + 1e-6)``; a and v stay.
       * ``g > limit`` or g not finite: extreme; gradients, a and v stay.

    After an extreme step ``result.skip`` is True: do not call the optimizer. The original applies such a step, saves a
    checkpoint with it and ends the run; ``reproduce_original=True`` reports ``stop`` instead of ``skip``. A first
    step that is not finite is skipped and leaves the statistics unset; the original lets it poison them for good.

    Args:
        decay: delta, 0.99 in the release.
        reproduce_original: never ask to skip; ``stop`` becomes and stays True after an extreme step.
        norm: of gradients that are spread over processes, see :func:`norm_over`; the same number on all of them.

    Raises:
        ValueError: ``decay`` outside (0, 1); no gradients.
    """

    def __init__(
        self,
        decay: float = 0.99,
        *,
        reproduce_original: bool = False,
        norm: Callable[[list[Tensor]], float] | None = None,
    ) -> None:
        super().__init__(decay)
        self.reproduce_original = reproduce_original
        self.norm = norm or gradient_norm

    @torch.no_grad()
    def __call__(self, parameters: Iterable[Tensor]) -> ClippingResult:
        """Clip the gradients in place; every rank must call this, and all get the same result."""
        grads = _gradients(parameters)
        norm = self.norm(grads)
        finite = math.isfinite(norm)
        if self.average is None:
            return self._first(norm, finite)

        threshold = self.threshold()
        limit = max(self.average + 5 * math.sqrt(self.variance), EXTREME_NORM)
        coefficient, norm_after = 1.0, norm
        extreme = not finite or norm > limit
        if norm <= threshold:
            self.observe(norm)
        elif norm <= limit:
            coefficient = norm / threshold
            torch._foreach_mul_([local(g) for g in grads], 1 / (coefficient + 1e-6))
            norm_after = self.norm(grads)
        return self._result(norm, norm_after, threshold, coefficient, finite, extreme)

    def _first(self, norm: float, finite: bool) -> ClippingResult:
        if finite or self.reproduce_original:
            # the order of min's arguments lets NaN through, as in the original
            self.average, self.variance = min(3 * norm, 1.0), 0.0
        # the original looks for extremes only from the second step on
        return self._result(norm, norm, None, 1.0, finite, extreme=not finite and not self.reproduce_original)

    def _result(
        self, norm: float, after: float, threshold: float | None, coefficient: float, finite: bool, extreme: bool
    ) -> ClippingResult:
        self.extreme_seen = self.extreme_seen or extreme
        return ClippingResult(
            norm,
            after,
            threshold,
            coefficient,
            finite,
            extreme,
            skip=extreme and not self.reproduce_original,
            stop=self.extreme_seen and self.reproduce_original,
        )


class PerRankGradientClipping(_NormStatistics):
    """Zero the gradients of ranks whose own norm is abnormal: the original's variant without distributed optimizer.

    Meant for gradients that are averaged over ranks afterwards. With r the fraction of normal ranks, an abnormal
    rank's gradients become zero and the others are multiplied by ``1 / (r + 1e-6)`` if r < 1. The average starts at 1
    and is then fed with ``r * max(norms after)``, unless more than ``2 * model_parallel_size`` ranks were abnormal;
    so with one rank a spike feeds a zero.

    When no rank is normal every gradient is zero, yet an optimizer step would still move the weights by momentum and
    decay: ``result.skip`` is then True, unless ``reproduce_original``.

    Args:
        decay: of the statistics.
        process_group: ranks whose norms are compared; None stands for this process alone.
        model_parallel_size: ranks that hold one model together.
        reproduce_original: never ask to skip.

    Raises:
        ValueError: ``decay`` outside (0, 1); no gradients.
    """

    def __init__(
        self,
        decay: float = 0.99,
        *,
        process_group: dist.ProcessGroup | None = None,
        model_parallel_size: int = 1,
        reproduce_original: bool = False,
    ) -> None:
        super().__init__(decay)
        self.process_group = process_group
        self.model_parallel_size = model_parallel_size
        self.reproduce_original = reproduce_original

    @torch.no_grad()
    def __call__(self, parameters: Iterable[Tensor]) -> ClippingResult:
        """Clip this rank's gradients in place; ``norm`` and ``norm_after`` are this rank's own."""
        grads = _gradients(parameters)
        norm = gradient_norm(grads)
        norms = self._gather(norm, grads[0].device)
        finite = all(math.isfinite(other) for other in norms)
        if self.average is None:
            self.average, self.variance = 1.0, 0.0
            return ClippingResult(norm, norm, None, finite=finite, skip=not finite and not self.reproduce_original)

        threshold = self.threshold()
        num_abnormal = sum(not other <= threshold for other in norms)  # "not <=" counts NaN as abnormal
        fraction = 1 - num_abnormal / len(norms)
        if not norm <= threshold:
            for grad in grads:
                grad.zero_()  # multiplying by zero would keep NaN
        elif fraction < 1:
            torch._foreach_mul_(grads, 1 / (fraction + 1e-6))
        norm_after = gradient_norm(grads)
        if num_abnormal <= 2 * self.model_parallel_size:
            self.observe(fraction * max(self._gather(norm_after, grads[0].device)))
        return ClippingResult(
            norm,
            norm_after,
            threshold,
            fraction,
            finite,
            skip=fraction == 0 and not self.reproduce_original,
            stop=num_abnormal > max(len(norms) / 2, 4 * self.model_parallel_size),
        )

    def _gather(self, value: float, device: torch.device) -> list[float]:
        if self.process_group is None:
            return [value]
        values = [torch.zeros(1, device=device) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(values, torch.tensor([value], device=device), group=self.process_group)
        return [float(v) for v in values]


def gradient_norm(grads: list[Tensor]) -> float:
    """L2 norm of all gradients together, accumulated in float32; sharded (DTensor) gradients count over all ranks."""
    total = torch.stack([_squares(grad) for grad in grads]).sum()
    return math.sqrt(float(total.full_tensor() if hasattr(total, "full_tensor") else total))


def norm_over(layout: Layout) -> Callable[[list[Tensor]], float]:
    """A :func:`gradient_norm` over all processes of a layout, the same number on each; all of them call it.

    A gradient that several ranks hold alike counts once: those of replicas, and those that ``tensor`` ranks do not cut.
    Stages of a pipeline each bring their own.
    """

    def norm(grads: list[Tensor]) -> float:
        whole, cut = (
            [_squares(local(g)) for g in grads if is_cut(g, "tensor") is is_piece] for is_piece in (False, True)
        )
        sums = [float(torch.stack(squares).sum()) if squares else 0.0 for squares in (whole, cut)]
        total = torch.tensor(sums[0] / layout.size("tensor") + sums[1], dtype=torch.float64) / layout.size("replicate")
        dist.all_reduce(total, group=layout.group("world"))
        return math.sqrt(float(total))

    return norm


def _squares(grad: Tensor) -> Tensor:
    # sum() adds pairwise; vector_norm adds in sequence and is off by 4e-4 after ten million elements on a CPU
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum()


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("gradient clipping: no parameter has a gradient")
    return grads
