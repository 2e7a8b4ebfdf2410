# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every system with random weights, as states and as folders."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

PRESETS = {
    "opensora_plan_v1_3": ("OpenSoraInpaint_v1_3", "tiny_i2v"),
    "opensora_plan_v1_5": ("SparseUMMDiT", "tiny"),
    "opensora_v2": ("MMDiT", "tiny_i2v"),
    "cogvideox": ("CogVideoXTransformer3DModel", "tiny-1.5-i2v"),
}


def build(system: str, preset: str | None = None) -> nn.Module:
    """A model whose every value is its own, so that no mix-up goes unseen."""
    module = importlib.import_module(f"vidgen.models.{system}")
    name, default = PRESETS[system]
    model = getattr(module, name)(module.preset(preset or default)).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """The folder and the state of a tiny model."""
    made: dict[tuple[str, str | None], tuple[Path, dict[str, Tensor]]] = {}

    def make(system: str, preset: str | None = None) -> tuple[Path, dict[str, Tensor]]:
        if (system, preset) not in made:
            model = build(system, preset)
            folder = tmp_path_factory.mktemp(system) / "model"
            model.save_pretrained(folder)
            made[system, preset] = folder, dict(model.state_dict())
        return made[system, preset]

    return make


@pytest.fixture
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two states have the same names and, bit for bit, the same tensors."""

    def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)

    return compare
