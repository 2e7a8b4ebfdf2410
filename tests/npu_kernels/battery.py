# SPDX-License-Identifier: Apache-2.0
"""The kernels as the battery of tests/ops wants an op: a reference, and a call."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from vidgen import ops
from vidgen.ops._backends.ascendc.kernels import KERNELS

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load() -> Any:
    path = Path(__file__).parents[1] / "ops" / "test_all_ops.py"
    spec = importlib.util.spec_from_file_location("battery", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


battery = load()


class OnKernels:
    """One op, computed by its Ascend C kernels."""

    def __init__(self, name: str) -> None:
        self.name, self.kernel, self.reference = name, KERNELS[name], ops.OPS[name].reference

    def __call__(self, *args: Any) -> Any:
        assert self.kernel.refuse(*args) is None
        return self.kernel.run(*args)
