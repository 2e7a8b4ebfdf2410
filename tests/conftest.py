# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    # here and not in goldens/conftest.py: pytest reads options only from conftest files it loads before collecting
    parser.addoption(
        "--goldens",
        type=Path,
        default=Path(__file__).parent / "data" / "golden",
        metavar="DIR",
        help="golden cases for tests/goldens: DIR/<system>/<case>.json, or one system's folder",
    )
