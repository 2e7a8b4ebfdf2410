# SPDX-License-Identifier: Apache-2.0
import importlib

import pytest

from vidgen import ops


@pytest.fixture
def native():
    """The compiled library; tests of what only it does are skipped where it is not built."""
    if ops.native_status is not None:
        pytest.skip(f"no compiled kernels: {ops.native_status}")
    return importlib.import_module("vidgen._C")
