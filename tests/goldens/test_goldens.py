# SPDX-License-Identifier: Apache-2.0
"""``pytest tests/goldens --goldens DIR`` runs every golden case below DIR; without it, the ones kept in tests/data."""

from __future__ import annotations

from pathlib import Path

import pytest

from .comparison import Case, Comparison, Worst
from .kinds import NOT_BUILT, RUNNERS


def test_golden(golden_file: Path, worst_errors: list[Worst]) -> None:
    run_case(golden_file, worst_errors)


def run_case(file: Path, worst_errors: list[Worst]) -> None:
    case = Case.load(file)
    kind = case.meta.get("kind") if isinstance(case.meta, dict) else None
    runner = RUNNERS.get((case.system, kind))
    if runner is None:
        if kind in NOT_BUILT.get(case.system, ()):
            pytest.skip(f"not built yet: {case.system} {kind} ({case.name})")
        pytest.fail(f"{case.system}/{case.name}: nobody knows how to run kind {kind!r} of folder {case.system!r}")
    comparison = Comparison(case)
    worst_errors.append(comparison.worst)
    try:
        runner(case, comparison)
    except BaseException as error:
        comparison.worst.failures.append(f"stopped by {error!r}")
        raise
    comparison.finish()
