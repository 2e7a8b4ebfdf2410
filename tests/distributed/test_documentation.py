# SPDX-License-Identifier: Apache-2.0
"""docs/context_parallel.md: its code runs, and a ring in bfloat16 is nearer the truth than dense attention."""

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from .pool import Pool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cp_tables", ROOT / "benchmarks" / "context_parallel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_processes(pool: Pool, ranks: int) -> None:
    replies = pool.run("precision", ranks)
    for name in replies[0]:
        ring = math.sqrt(sum(reply[name][0] for reply in replies))
        dense = math.sqrt(replies[0][name][1])
        assert 0 < ring < dense, name


def test_error_does_not_grow(tables: ModuleType) -> None:
    table = tables.measure_errors(tokens=512, heads=2, dim=32)
    (dense,) = table["dense"].values()
    ours = table["ours"]
    assert list(ours) == [2, 4, 8, 16]
    for errors in ours.values():
        assert all(0 < ring < other for ring, other in zip(errors, dense, strict=True))
        assert all(abs(ring / first - 1) < 0.02 for ring, first in zip(errors, ours[2], strict=True))
    # The harness can tell: sums in 16 bits do grow.
    assert table["16-bit sums"][16][0] > 1.5 * table["16-bit sums"][2][0]


def test_table_in_the_documentation(tables: ModuleType) -> None:
    page = tables.PAGE.read_text()
    dense = re.search(r"\| dense, one process \| (\S+), (\S+) \|", page)
    rows = re.findall(r"\| (\d+) ranks \| (\S+), (\S+) \|", page)
    assert dense is not None and [int(ranks) for ranks, *_ in rows] == [2, 4, 8, 16]
    for _, *errors in rows:
        assert all(float(ring) < float(other) for ring, other in zip(errors, dense.groups(), strict=True))
    assert tables.volume_table() in page


def test_code_in_the_documentation(pool: Pool, tables: ModuleType) -> None:
    for shapes in pool.run("documentation", 4, page=tables.PAGE.read_text()):
        assert shapes == [(1, 16, 12), (1, 16, 3, 4), (1, 5, 3, 4)]
