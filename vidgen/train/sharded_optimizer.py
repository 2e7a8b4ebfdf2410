# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a sharded model: each rank steps its own part of its shards, and the replicas share the work.

Of a rank's shard of a parameter, seen as n numbers in a row, replica r of R steps the numbers from ``r * ceil(n / R)``
on, ``ceil(n / R)`` of them (the last ones fewer). So moments, averages and the like take 1 / (shards * replicas) of
what one process needs. Afterwards the replicas send each other what they have stepped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidgen.parallel.layout import Layout
from vidgen.parallel.sharding import buckets, like, local

from .optimizer import EMAAdamW

PARTS = ("exp_avg", "exp_avg_sq", "ema")  # of the state of a parameter, each of its shape


class ShardedEMAAdamW:
    """:class:`EMAAdamW` over the shards of ``parameters``.

    Args:
        parameters: by name; DTensors or plain tensors, contiguous, float32 or wider. All ranks of a replica group have
            the same names in the same order.
        layout: of the run; its ``replicate`` ranks hold equal parameters and, at each step, equal gradients.
        shard_over_replicas: False lets every replica step everything, as FSDP2 alone would.
        options: of :class:`EMAAdamW`.

    Raises:
        ValueError: a parameter that is not contiguous, or a half-precision one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layout: Layout,
        *,
        shard_over_replicas: bool = True,
        **options: Any,
    ) -> None:
        self.parameters = dict(parameters)
        self.group = layout.group("replicate")
        split = shard_over_replicas and layout.size("replicate") > 1
        self.replicas, self.replica = (layout.size("replicate"), layout.rank("replicate")) if split else (1, 0)
        for name, p in self.parameters.items():
            if not local(p).is_contiguous():
                raise ValueError(f"ShardedEMAAdamW: {name} must be contiguous, got strides {local(p).stride()}")
            if p.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"ShardedEMAAdamW: {name} must be float32 (FSDP2 casts for computation), got {p.dtype}"
                )
        # Parameters that share the memory of what this rank steps; EMAAdamW need not know that they are slices.
        self.slices = {name: nn.Parameter(self._slice(p)) for name, p in self.parameters.items()}
        self.optimizer = EMAAdamW(list(self.slices.values()), **options)
        self.optimizer.start()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def ema_decay(self) -> float | None:
        return self.optimizer.ema_decay

    def _bounds(self, p: Tensor) -> tuple[int, int]:
        n = local(p).numel()
        size = -(-n // self.replicas)
        return min(n, self.replica * size), min(n, (self.replica + 1) * size)

    def _slice(self, p: Tensor) -> Tensor:
        start, stop = self._bounds(p)
        return local(p.detach()).view(-1)[start:stop]

    @torch.no_grad()
    def step(self) -> None:
        """Update this rank's part, then fetch those of the other replicas."""
        for name, p in self.parameters.items():
            own = self.slices[name]
            own.data = self._slice(p)  # FSDP2 may have moved its shards since
            own.grad = None if p.grad is None else self._slice(p.grad)
        self.optimizer.step()
        for own in self.slices.values():
            own.grad = None
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters.values():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                local(p.grad).zero_()

    @torch.no_grad()
    def _share(self) -> None:
        """Send every replica what this one has stepped."""
        if self.replicas == 1:
            return
        wholes = [local(p.detach()).view(-1) for p in self.parameters.values()]
        for bucket in buckets(wholes):
            gathered = self._all_gather([w[slice(*self._bounds(w))] for w in bucket], bucket)
            for whole, value in zip(bucket, gathered, strict=True):
                whole.copy_(value)

    def _all_gather(self, slices: list[Tensor], wholes: list[Tensor]) -> list[Tensor]:
        """The slices of all replicas joined, each as long as its whole; through one exchange."""
        sizes = [-(-whole.numel() // self.replicas) for whole in wholes]
        sent = wholes[0].new_zeros(sum(sizes))
        for own, room in zip(slices, sent.split(sizes), strict=True):
            room[: own.numel()] = own
        received = sent.new_empty(self.replicas, len(sent))
        dist.all_gather(list(received.unbind()), sent, group=self.group)
        columns = received.split(sizes, dim=1)
        return [c.reshape(-1)[: whole.numel()] for c, whole in zip(columns, wholes, strict=True)]

    @contextmanager
    def use_ema(self) -> Iterator[None]:
        """Within this context the model's parameters hold the averages, on every rank; all ranks enter and leave it.

        Raises:
            ValueError: the optimizer keeps no average.
        """
        for name, p in self.parameters.items():
            self.slices[name].data = self._slice(p)
        try:
            with self.optimizer.use_ema():
                self._share()
                yield
        finally:
            self._share()

    # State, as a checkpoint sees it

    @torch.no_grad()
    def full_state(self, device: torch.device | str | None = None) -> dict[str, dict[str, Tensor]]:
        """By name of the parameter: ``exp_avg``, ``exp_avg_sq``, ``ema``, which lie as it does, and a scalar, ``step``.

        All ranks call this. They are DTensors where the parameter is one.

        Args:
            device: where the tensors are to lie; default: where the parameter does. They are copies.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for name, p in self.parameters.items():
            own = self.optimizer.state[self.slices[name]]
            whole = local(p.detach()).view(-1)
            state[name] = {"step": own["step"].clone()}
            for part in PARTS:
                if part in own:
                    value = own[part].clone() if self.replicas == 1 else self._all_gather([own[part]], [whole])[0]
                    state[name][part] = like(value.view(local(p).shape).to(device or value.device), p)
        return state

    @torch.no_grad()
    def load_full_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what :meth:`full_state` gave, of any layout whose tensors now lie as the parameters do.

        Raises:
            ValueError: other parameters, or other parts than this optimizer keeps.
        """
        if state.keys() != self.parameters.keys():
            wrong = sorted(state.keys() ^ self.parameters.keys())[:10]
            raise ValueError(f"ShardedEMAAdamW: state must be of the same parameters, differs in {', '.join(wrong)}")
        for name, parts in state.items():
            own = self.optimizer.state[self.slices[name]]
            if parts.keys() != own.keys():
                raise ValueError(
                    f"ShardedEMAAdamW: {name} must have {', '.join(sorted(own))}, got {', '.join(sorted(parts))}"
                )
            for part, value in parts.items():
                if part == "step":
                    own[part].copy_(local(value))
                    continue
                start, stop = self._bounds(self.parameters[name])
                own[part].copy_(local(value).reshape(-1)[start:stop])

    def load_group_options(self, groups: list[dict[str, Any]]) -> None:
        """Take rates, and the count of steps that the average follows, from groups without their parameters.

        Raises:
            ValueError: more groups, or fewer.
        """
        if len(groups) != len(self.param_groups):
            raise ValueError(f"ShardedEMAAdamW: groups must be {len(self.param_groups)}, got {len(groups)}")
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in values.items() if name != "params"})

    def state_bytes(self) -> int:
        """Bytes that this rank's moments and averages take."""
        return sum(
            own[part].numel() * own[part].element_size()
            for own in self.optimizer.state.values()
            for part in PARTS
            if part in own
        )
