# SPDX-License-Identifier: Apache-2.0
"""Adapters of low rank, added to the weights that they were trained beside: ``W + alpha / r * B A``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .hf import SHOWN, paragraph, with_nearest
from .lazy import Lazy, State

# ``NAME.lora_A.default.weight`` as PEFT holds it in memory, ``NAME.lora_A.weight`` as it saves it.
HALF = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")


def pairs(adapters: Mapping[str, Lazy]) -> dict[str, tuple[Lazy, Lazy]]:
    """A and B by the name of the layer that they belong to.

    Raises:
        ValueError: names that are not those of adapters, halves without the other, or halves of different rank.
    """
    halves: dict[str, dict[str, Lazy]] = {}
    foreign = []
    for name, value in adapters.items():
        if (match := HALF.fullmatch(name)) is None:
            foreign.append(name)
        else:
            halves.setdefault(match[1], {})[match[2]] = value
    single = [f"{layer}.lora_{next(iter(found))}" for layer, found in halves.items() if len(found) == 1]
    unequal = [
        f"{layer}: A {found['A'].shape}, B {found['B'].shape}"
        for layer, found in halves.items()
        if len(found) == 2
        and (len(found["A"].shape), len(found["B"].shape), found["A"].shape[:1]) != (2, 2, found["B"].shape[1:])
    ]
    problems = [
        *paragraph("that are no adapters", foreign[:SHOWN], len(foreign)),
        *paragraph("without the other half", single[:SHOWN], len(single)),
        *paragraph("of different ranks", unequal[:SHOWN], len(unequal)),
    ]
    if problems or not halves:
        raise ValueError("the adapters cannot be used\n" + "\n".join(problems or ["  there are none"]))
    return {layer: (found["A"], found["B"]) for layer, found in halves.items()}


def add(base: Mapping[str, Lazy], adapters: Mapping[str, Lazy], alpha: float) -> State:
    """``base`` with every adapter added to the weight of its layer; all of them or none.

    The sum is formed in float32 (float64 for such weights) and kept in the weight's dtype.

    Raises:
        ValueError: see :func:`pairs`; an adapter whose layer ``base`` does not have, or of another shape.
    """
    found = pairs(adapters)
    weights = [name for name in base if name.endswith(".weight")]
    absent = [with_nearest(f"{layer}.weight", weights) for layer in found if f"{layer}.weight" not in base]
    shapes = []
    for layer, (a, b) in found.items():
        weight = base.get(f"{layer}.weight")
        if weight is not None and weight.shape != (b.shape[0], a.shape[1]):
            shapes.append(f"{layer}.weight: the adapter makes {(b.shape[0], a.shape[1])}, the base has {weight.shape}")
    problems = [
        *paragraph("without a weight in the base", absent[:SHOWN], len(absent)),
        *paragraph("of another shape", shapes[:SHOWN], len(shapes)),
    ]
    if problems:
        raise ValueError("the adapters do not fit the base\n" + "\n".join(problems))
    return {
        **base,
        **{f"{layer}.weight": _sum(base[f"{layer}.weight"], a, b, alpha) for layer, (a, b) in found.items()},
    }


def _sum(weight: Lazy, a: Lazy, b: Lazy, alpha: float) -> Lazy:
    def load() -> torch.Tensor:
        kind = torch.promote_types(weight.dtype, torch.float32)
        change = b.load().to(kind) @ a.load().to(kind)
        return (weight.load().to(kind) + alpha / a.shape[0] * change).to(weight.dtype)

    return Lazy(weight.shape, weight.dtype, load)
