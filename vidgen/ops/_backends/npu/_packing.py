# SPDX-License-Identifier: Apache-2.0
"""Padded sequences without their padding, for attention over packed keys (TND).

How many keys a sequence keeps is an argument on the host, while masks lie on the device: they have to be read, and
that waits for the device. All layers of a model share their masks, so one reading serves a whole forward pass. The
other way, a mask of queries x keys, needs no reading, but takes 1.4 GB for 37,000 tokens.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Packing:
    """Which keys each sequence of ``(sequences, keys)`` sees, known on the host.

    Attributes:
        rows: those keys among all ``sequences * keys``; None: all of them.
        ends: where each sequence ends among them.
        blind: ``(sequences)`` bool, those that see nothing, or None. They are given all keys: packed sequences must not
            be empty. Their result is to be made 0.
    """

    rows: Tensor | None
    ends: tuple[int, ...]
    blind: Tensor | None


def pack(allowed: Tensor, device: torch.device) -> Packing:
    """From a mask ``(sequences, keys)``, True = attend, on any device."""
    shown = allowed.cpu()
    blind = ~shown.any(1, keepdim=True)
    shown = shown | blind
    ends = tuple(itertools.accumulate(shown.sum(1).tolist()))
    rows = None if bool(shown.all()) else shown.flatten().nonzero().squeeze(1).to(device)
    return Packing(rows, ends, blind.squeeze(1).to(device) if bool(blind.any()) else None)


@dataclass
class _Reading:
    """What was read of the masks, and the state they were in."""

    sources: list[weakref.ref[Tensor]]
    versions: list[int]
    packing: Packing

    def holds(self, sources: list[Tensor]) -> bool:
        same = len(sources) == len(self.sources) and all(r() is t for r, t in zip(self.sources, sources, strict=True))
        return same and self.versions == [t._version for t in sources]


_readings: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first mask: {form: _Reading}


def readable(*tensors: Tensor | None) -> bool:
    """Whether there is something to read: not while a graph is traced, nor of tensors without values."""
    return not torch.compiler.is_compiling() and not any(t is not None and is_fake(t) for t in tensors)


def read(sources: list[Tensor], form: tuple[Any, ...], allowed: Callable[[], Tensor]) -> Packing:
    """The packing of ``allowed()``, a mask that follows from ``sources`` and ``form``; read once while these are alike.

    Tensors made in inference mode do not tell when they are written to, and so are read every time.
    """
    device = sources[0].device
    if any(t.is_inference() for t in sources):
        return pack(allowed(), device)
    readings = _readings.setdefault(sources[0], {})
    found = readings.get(form)
    if found is None or not found.holds(sources):
        refs = [weakref.ref(t) for t in sources]
        found = readings[form] = _Reading(refs, [t._version for t in sources], pack(allowed(), device))
    return found.packing
