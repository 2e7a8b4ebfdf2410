# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from .pool import Pool


@pytest.fixture(scope="package")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Four gloo processes, started once for the tests of this folder; idle ones take time from the others."""
    pool = Pool(tmp_path_factory.mktemp("gloo"), world=4)
    yield pool
    pool.stop()
