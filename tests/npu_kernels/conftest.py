# SPDX-License-Identifier: Apache-2.0
import shutil
from collections.abc import Iterator

import pytest

from .twin import Twin


@pytest.fixture(scope="session")
def built() -> Twin:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    return Twin()


@pytest.fixture
def twin(built: Twin) -> Iterator[Twin]:
    built.set_cores(8)
    built.peaks()
    yield built
