# SPDX-License-Identifier: Apache-2.0
"""The Ascend C kernels' operators on tensors of device npu (rung 6).

Host code that is compiled against the headers of torch_npu and runs under its dispatch key, the kernels behind it in
the CPU twin; values and gradients of the ops equal the reference.
"""

from collections.abc import Iterator

import pytest

from tests.npu_kernels import twin
from vidgen.ops._backends.ascendc.kernels import KERNELS

from . import environment
from .conftest import need
from .worker import Worker


@pytest.fixture(scope="module")
def npu() -> Iterator[Worker]:
    """A process of this file's own: once loaded, the kernels would serve the other tests too."""
    need("torch_npu")
    worker = Worker(environment.torch_npu())
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def library(npu: Worker) -> str:
    assert "not built" in npu.run("cases_ascendc.says_why_not")
    twin.build("device")  # what asks CANN for the number of cores: compiles, and cannot be linked here
    return str(twin.build("twin_npu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_samples(npu: Worker, library: str, name: str, dtype: str) -> None:
    found = npu.run("cases_ascendc.samples_equal", library=library, name=name, dtype=dtype)
    assert name in found["calls"]
    if (backward := f"{name}_backward") in KERNELS:
        assert backward in found["calls"]
    assert set(found["refused"]) <= {"the kernel takes modulations per sample, not per token"}


def test_float64_is_refused(npu: Worker, library: str) -> None:
    said = npu.run("cases_ascendc.float64_is_refused", library=library)
    assert said == ["npu_ascendc: the kernels take float32, bfloat16 and float16, not float64"] * len(KERNELS)


def test_forced_backend_obeys_or_raises(npu: Worker, library: str) -> None:
    said = npu.run("cases_ascendc.forced_backend_obeys_or_raises", library=library)
    assert said == (
        "adaln_modulate: backend 'npu_ascendc' was asked for but the kernel takes modulations per sample, not per token"
    )


def test_internal_format_is_refused(npu: Worker, library: str) -> None:
    said = npu.run("cases_ascendc.internal_format_is_refused", library=library)
    assert "cannot read a tensor of torch_npu's internal format 29" in said
