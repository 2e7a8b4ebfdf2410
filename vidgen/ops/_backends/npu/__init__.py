# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations


def register(device: str) -> None:
    """Nothing here yet."""
