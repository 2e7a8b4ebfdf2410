# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from . import environment
from .worker import Worker


def need(package: str) -> None:
    if (reason := environment.why_not(package)) is not None:
        pytest.fail(reason) if environment.required() else pytest.skip(reason)


@pytest.fixture(scope="session")
def npu() -> Iterator[Worker]:
    """``npu.run("cases_file.function", **arguments)``: in a process with torch_npu and one device of host memory."""
    need("torch_npu")
    worker = Worker(environment.torch_npu())
    yield worker
    worker.stop()
