# SPDX-License-Identifier: Apache-2.0
"""Whole transformers with their tokens over processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import difference
from layouts import make_layout
from tiny import make_inputs, make_model

from vidgen.parallel.context import spread


def model(
    group: dist.ProcessGroup,
    system: str,
    parallel: dict[str, Any],
    *,
    skiparse: Any = "heads",
    preset: str | None = None,
    latent: tuple[int, int, int] = (3, 6, 10),
    checkpointing: bool = False,
    changes: dict[str, Any] | None = None,
    **inputs: Any,
) -> dict[str, float]:
    """Largest differences of the output and of every parameter's gradient from one process."""
    layout = make_layout(dist.get_world_size(group), **parallel)
    assert layout is not None
    whole = make_model(system, preset, **changes or {})
    own = copy.deepcopy(whole)
    own.gradient_checkpointing = checkpointing
    spread(own, layout, skiparse)
    arguments = make_inputs(whole, latent, **inputs)
    expected = whole(**arguments)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * upstream).sum().backward()
    got = own(**arguments)
    ((got * upstream).sum() / layout.size("sequence")).backward()
    errors = {"output": difference(got.detach(), expected.detach()) / expected.abs().max().item()}
    largest = max(p.grad.abs().max().item() for p in whole.parameters() if p.grad is not None)
    for (name, p), q in zip(whole.named_parameters(), own.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            dist.all_reduce(q.grad, group=layout.group("sequence"))
            errors[name] = difference(q.grad, p.grad) / max(p.grad.abs().max().item(), 0.01 * largest)
    return errors
