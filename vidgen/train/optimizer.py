# SPDX-License-Identifier: Apache-2.0
"""AdamW that keeps an exponential moving average of the weights in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class EMAAdamW(torch.optim.Optimizer):
    """AdamW with decoupled decay and a shadow copy of the weights (Open-Sora Plan v1.5, ``fused_ema_adamw``).

    At a parameter's t-th step, with gradient g and first and second moments m and v::

        m = beta1 * m + (1 - beta1) * g          v = beta2 * v + (1 - beta2) * g^2
        p = p - lr * ( (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p )
        s = d * s + (1 - d) * p                  d = min(ema_decay, (1 + n) / (10 + n))

    ``s`` starts as a copy of p before its first step and n counts this optimizer's steps including the current one.
    The defaults are those of the release. The original forgets n when it resumes, so that its average restarts almost
    from the current weights; here n is saved with the state.

    Moments, average and arithmetic are float32. A bfloat16 or float16 parameter gets a float32 master copy, which is
    what is stepped and averaged, and is rounded into the parameter after each step.

    Args:
        params: parameters or parameter groups; ``lr``, ``betas``, ``eps`` and ``weight_decay`` may differ by group.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by ``lr``.
        ema_decay: largest decay of the average, in [0, 1); None keeps no average.
        ema_warmup: let the decay rise to it as above; False averages with ``d = ema_decay`` from the first step on, as
            Open-Sora 2.0 does.

    Raises:
        ValueError: a hyperparameter out of range; in ``step``, a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 1e-4,
        ema_decay: float | None = 0.9999,
        ema_warmup: bool = True,
    ) -> None:
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"EMAAdamW: ema_decay must lie in [0, 1) or be None, got {ema_decay}")
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self._ema_is_in_use = False
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "num_steps": 0}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"EMAAdamW: {name} must not be negative, got {group[name]}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"EMAAdamW: betas must be two numbers in [0, 1), got {group['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient, and every average."""
        if self._ema_is_in_use:
            raise RuntimeError("EMAAdamW: step inside use_ema would train the averaged weights")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            self._step_group(group)
        return result

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if p.grad.layout != torch.strided:
                raise ValueError(f"EMAAdamW: gradients must be dense, got {p.grad.layout}")
            if not self.state.get(p):
                self._start(p)
        group["num_steps"] += 1
        if params:
            states = [self.state[p] for p in params]
            values = [state.get("master", p) for p, state in zip(params, states, strict=True)]
            self._adamw(group, values, [p.grad.to(v.dtype) for p, v in zip(params, values, strict=True)], states)
            for p, value in zip(params, values, strict=True):
                if value is not p:
                    p.copy_(value)
        if self.ema_decay is not None:
            n = group["num_steps"]
            averaged = [p for p in group["params"] if self.state.get(p)]
            if averaged:
                torch._foreach_lerp_(
                    [self.state[p]["ema"] for p in averaged],
                    [self.state[p].get("master", p) for p in averaged],
                    1 - (min(self.ema_decay, (1 + n) / (10 + n)) if self.ema_warmup else self.ema_decay),
                )

    def start(self) -> None:
        """Begin the state of every parameter now, as its first step would: the average is what the parameter is now."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p):
                    self._start(p)

    @torch.no_grad()
    def _start(self, p: Tensor) -> None:
        state = self.state[p]
        value = p
        if p.dtype in (torch.bfloat16, torch.float16):
            value = state["master"] = p.detach().float()
        # a CPU tensor rather than an int: distributed checkpoints then treat it as torch's own optimizers' step
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(value, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(value, memory_format=torch.preserve_format)
        if self.ema_decay is not None:
            state["ema"] = value.detach().clone(memory_format=torch.preserve_format)

    @staticmethod
    def _adamw(
        group: dict[str, Any], values: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        moments, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1.0)
        steps = [s["step"].item() for s in states]

        torch._foreach_lerp_(moments, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(values, moments, roots, [-lr / (1 - beta1**t) for t in steps])

    def ema_parameters(self) -> list[Tensor]:
        """The averages, in the order of the parameters in ``param_groups``; a parameter never stepped is its own.

        Raises:
            ValueError: the optimizer keeps no average.
        """
        self._require_ema("ema_parameters")
        params = [p for group in self.param_groups for p in group["params"]]
        return [self.state[p]["ema"] if self.state.get(p) else p.detach() for p in params]

    @contextmanager
    def use_ema(self) -> Iterator[None]:
        """Within this context the model's parameters hold the averages; on leaving, exactly what they held before.

        Raises:
            ValueError: the optimizer keeps no average.
            RuntimeError: entered twice, or ``step`` is called inside.
        """
        self._require_ema("use_ema")
        if self._ema_is_in_use:
            raise RuntimeError("EMAAdamW: use_ema is already active")
        params = [p for group in self.param_groups for p in group["params"] if self.state.get(p)]
        with torch.no_grad():
            trained = [p.detach().clone() for p in params]
            for p in params:
                p.copy_(self.state[p]["ema"])
        self._ema_is_in_use = True
        try:
            yield
        finally:
            self._ema_is_in_use = False
            with torch.no_grad():
                for p, value in zip(params, trained, strict=True):
                    p.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any], *, restart_ema_warmup: bool = False) -> None:
        """Restore moments, averages, master copies, step counts and n.

        Args:
            restart_ema_warmup: count n from 0 again, which is what the original does on every resume.

        Raises:
            ValueError: the groups do not fit, or the state was not written by an EMAAdamW with the same parts.
        """
        parts = {"step", "exp_avg", "exp_avg_sq"} | ({"ema"} if self.ema_decay is not None else set())
        for index, state in state_dict["state"].items():
            if missing := parts - state.keys():
                raise ValueError(
                    f"EMAAdamW.load_state_dict: parameter {index} lacks {', '.join(sorted(missing))}, "
                    f"got {', '.join(sorted(state))}"
                )
        if any("num_steps" not in group for group in state_dict["param_groups"]):
            raise ValueError("EMAAdamW.load_state_dict: param_groups lack num_steps: not written by an EMAAdamW")
        super().load_state_dict(state_dict)
        # torch casts the state to the parameter's dtype, which would round the float32 parts of half parameters
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step":
                    self.state[p][name] = value.to(p.device)
        if restart_ema_warmup:
            for group in self.param_groups:
                group["num_steps"] = 0

    def _require_ema(self, name: str) -> None:
        if self.ema_decay is None:
            raise ValueError(f"EMAAdamW.{name}: ema_decay is None, so no average is kept")
