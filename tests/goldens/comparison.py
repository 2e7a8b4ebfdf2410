# SPDX-License-Identifier: Apache-2.0
"""One golden case on disk, and the comparison of what we compute with what it stores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Case:
    """``<system>/<name>.json`` and the tensors beside it."""

    system: str
    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path = Path()

    @classmethod
    def load(cls, path: Path) -> Case:
        meta = json.loads(path.read_text())
        tensors_file = path.with_suffix(".safetensors")
        tensors = load_file(tensors_file) if tensors_file.exists() else {}
        return cls(path.parent.name, path.stem, meta, tensors, path.parent)

    def neighbour(self, name: str) -> Case:
        """Another case of the same folder, such as the one that holds this one's weights."""
        return Case.load(self.folder / f"{name}.json")

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix ("w/", "in/", "out/grad/"), without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def tolerance(self, part: str | None = None) -> tuple[float, float]:
        """``(atol, rtol)`` of the case, or of a part that it states one for; exact and unstated are zero and zero.

        Known forms: ``{"atol": .., "rtol": ..}``, the same or ``{part: {..}}`` below ``"float32"``, ``"exact"``, null.
        """
        stated = self.meta.get("tolerance")
        stated = {} if stated is None or stated == "exact" else stated
        stated = stated.get("float32", stated)
        stated = stated[part] if part is not None else stated
        stated = {} if stated == "exact" else stated
        if any(isinstance(value, dict) for value in stated.values()):  # every comparison names its part
            return 0.0, 0.0
        if not stated.keys() <= {"atol", "rtol", "exact", "note", "dtype"}:
            raise AssertionError(f"{self.system}/{self.name}: tolerance is not of a known form: {stated}")
        return float(stated.get("atol", 0)), float(stated.get("rtol", 0))


@dataclass
class Worst:
    """The largest error of a case, for the table at the end."""

    label: str
    kind: str
    error: float = 0.0
    share: float = 0.0
    output: str = "-"
    failures: list[str] = field(default_factory=list)


class Comparison:
    """Compares outputs by name and remembers the worst; ``finish`` fails with every mismatch at once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.atol, self.rtol = case.tolerance()
        self.expected = case.group("out/")
        self.unused = set(self.expected)
        self.worst = Worst(f"{case.system}/{case.name}", str(case.meta["kind"]))

    def __call__(
        self, name: str, ours: Any, wanted: Any = None, *, part: str | None = None, atol: float | None = None
    ) -> None:
        """``abs(ours - wanted) <= atol + rtol * abs(wanted)``; ``wanted`` defaults to the stored ``out/<name>``.

        ``part`` names the tolerance where the case states several; ``atol`` is one that it states in words.
        """
        stated, rtol = (self.atol, self.rtol) if part is None else self.case.tolerance(part)
        atol = stated if atol is None else atol
        if wanted is None:
            wanted = self.expected[name]
            self.unused.discard(name)
        ours, wanted = _wide(ours), _wide(wanted)
        if ours.shape != wanted.shape:
            self.worst.failures.append(f"{name}: shape {tuple(ours.shape)}, stored {tuple(wanted.shape)}")
            return
        # equal first, so that infinities and NaN in the same place count as equal
        same = (ours == wanted) | (ours.isnan() & wanted.isnan())
        error = torch.where(same, 0.0, (ours - wanted).abs().nan_to_num(nan=torch.inf))
        allowed = atol + rtol * wanted.abs().nan_to_num()
        share = torch.where(error == 0, 0.0, error / allowed)
        largest, largest_share = (float(t.max()) if t.numel() else 0.0 for t in (error, share))
        if largest_share > 1:
            self.worst.failures.append(
                f"{name}: {int((share > 1).sum())} of {share.numel()} values differ, largest error {largest:.3e}, "
                f"{largest_share:.2f} times the tolerance (atol {atol}, rtol {rtol})"
            )
        self.worst.error = max(self.worst.error, largest)
        if self.worst.output == "-" or largest_share > self.worst.share:
            self.worst.share, self.worst.output = largest_share, name

    def equal(self, name: str, ours: Any, wanted: Any) -> None:
        """For answers that are not numbers: names, lists, flags."""
        if ours != wanted:
            self.worst.failures.append(f"{name}: got {ours!r}, stored {wanted!r}")

    def finish(self) -> None:
        if self.unused:
            self.worst.failures.append(f"stored but never compared: {', '.join(sorted(self.unused))}")
        assert not self.worst.failures, f"{self.worst.label}:\n  " + "\n  ".join(self.worst.failures)


def _wide(value: Any) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return tensor.to(device="cpu", dtype=torch.float64)
