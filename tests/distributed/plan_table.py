# SPDX-License-Identifier: Apache-2.0
"""The measured table of docs/scaling.md: ``python tests/distributed/plan_table.py`` counts anew and writes it."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
SPARSE = SYSTEMS[:2]
CASES: dict[str, dict[str, Any]] = {
    "ulysses 4": {"ulysses": 4},
    "ring 4": {"ring": 4},
    "ulysses 2 x ring 2": {"ulysses": 2, "ring": 2},
    "tensor 4": {"tensor": 4},
    "tensor 2 x ulysses 2": {"tensor": 2, "ulysses": 2},
    "groups 4": {"ulysses": 4, "skiparse": "groups"},
}
Counts = list[dict[str, tuple[int, int, int]]]  # of each rank, by case: sent forward, sent backward, kept


def cases_of(system: str) -> dict[str, dict[str, Any]]:
    return {name: case for name, case in CASES.items() if system in SPARSE or "skiparse" not in case}


def sent_table(measure: Callable[[str], Counts], formula: Callable[[str, str], tuple[float, float]]) -> str:
    """Bytes of a rank, the mean of all ranks, forward and backward, as counted and by formula."""
    lines = ["| model | mode | counted, forward | formula | counted, backward | formula |", "|---|---|---|---|---|---|"]
    for system in SYSTEMS:
        for name in cases_of(system):
            counted = [sum(rank[name][way] for rank in measure(system)) / 4 for way in (0, 1)]
            cells = [f"{n:,.0f}" for pair in zip(counted, formula(system, name), strict=True) for n in pair]
            lines.append(f"| {system} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from tests.distributed.pool import Pool
    from tests.distributed.test_plan import formula_of

    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder), 4)
        counts = {s: pool.run("plan_cases.exchanges", 4, system=s, cases=cases_of(s)) for s in SYSTEMS}
        pool.stop()
    table = sent_table(lambda system: counts[system], formula_of)
    page = re.sub(
        r"(<!-- sent -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", PAGE.read_text(), flags=re.S
    )
    PAGE.write_text(page)
    print(table)


if __name__ == "__main__":
    main()
