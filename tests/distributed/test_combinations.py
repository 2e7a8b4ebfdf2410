# SPDX-License-Identifier: Apache-2.0
"""Three optimizer steps of the whole trainer in every mode, for every system, equal those of one process.

``python tests/distributed/test_combinations.py --write`` runs all of them, with those that are slow, and writes the
table of docs/parallel.md.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest

try:
    from .pool import Pool
except ImportError:  # as a program
    from pool import Pool  # type: ignore[no-redef]

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallel.md"
SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
SPARSE = SYSTEMS[:2]
MODES: dict[str, dict[str, Any]] = {
    "FSDP 2": {},
    "FSDP 3": {},
    "Ulysses 2": {"ulysses": 2},
    "Ulysses 3": {"ulysses": 3},
    "ring 2": {"ring": 2},
    "ring 3": {"ring": 3},
    "groups 2": {"ulysses": 2, "skiparse": "groups"},
    "groups 3": {"ulysses": 3, "skiparse": "groups"},
    "TP + SP 2": {"tensor": 2},
    "PP 2": {"pipeline": 2},
    "PP 3": {"pipeline": 3},
    "FSDP 4": {},
    "HSDP 2 x 2": {"replicate": 2},
    "replicas 4, optimizer sharded": {"replicate": 4},
    "Ulysses 4": {"ulysses": 4},
    "ring 4": {"ring": 4},
    "groups 4": {"ulysses": 4, "skiparse": "groups"},
    "TP + SP 4": {"tensor": 4},
    "PP 4": {"pipeline": 4},
    "PP 2, two virtual stages each": {"pipeline": 2, "stages": "virtual"},
    "FSDP x Ulysses": {"ulysses": 2},
    "FSDP x ring": {"ring": 2},
    "TP + SP x FSDP": {"tensor": 2},
    "TP + SP x Ulysses": {"tensor": 2, "ulysses": 2},
    "ring x Ulysses": {"ring": 2, "ulysses": 2},
    "ring x Ulysses, ring inner": {"ring": 2, "ulysses": 2, "order": "ring_inner"},
    "PP x FSDP": {"pipeline": 2},
    "PP x TP + SP": {"pipeline": 2, "tensor": 2},
    "PP x Ulysses": {"pipeline": 2, "ulysses": 2},
    "HSDP x groups": {"replicate": 2, "ulysses": 2, "skiparse": "groups"},
    "FSDP x groups": {"ulysses": 2, "skiparse": "groups"},
}
FEWER = {mode: int(mode[-1]) for mode in MODES if mode[-1] in "23" and " x " not in mode}  # processes than four
BLOCKS = {"opensora_plan_v1_5": 6}  # of the tiny models; 4 in the others
# What the default suite runs: pairs of modes, and each system.
DEFAULT = {
    ("TP + SP x FSDP", "opensora_plan_v1_3"),
    ("ring x Ulysses", "cogvideox"),
    ("PP x FSDP", "opensora_plan_v1_5"),
    ("HSDP x groups", "opensora_plan_v1_5"),
    ("FSDP x Ulysses", "opensora_v2"),
}
ALL = [
    (mode, system)
    for mode, parallel in MODES.items()
    for system in (SPARSE if parallel.get("skiparse") == "groups" else SYSTEMS)
]
COLUMNS = ("loss", "output", "gradients", "weights", "average")
LIMIT = 1e-5


def settings(mode: str, system: str) -> tuple[dict[str, Any], int]:
    """The section ``parallel``, and micro-steps of a step: as many as a pipeline needs."""
    parallel = dict(MODES[mode])
    if parallel.get("stages") == "virtual":
        each, more = divmod(BLOCKS.get(system, 4), 4)
        parallel["stages"] = [[each + (more > 0), each], [each, each + (more > 1)]]
    if parallel.keys() & {"replicate"} and len(parallel) == 1 and parallel["replicate"] == 4:
        parallel["shard"] = 1
    return parallel, 4 if "pipeline" in parallel else 1


def run(pool: Any, mode: str, system: str, folder: Path) -> dict[str, float]:
    parallel, accumulation = settings(mode, system)
    arguments = {"system": system, "parallel": parallel, "folder": folder, "accumulation": accumulation}
    found: dict[str, float] = pool.run("combination_cases.compare", pool.world, **arguments)[0]
    return found


@pytest.mark.parametrize(
    ("mode", "system"), [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in ALL]
)
def test_equals_one_process(pool: Pool, tmp_path: Path, mode: str, system: str) -> None:
    if mode in FEWER:
        pool = Pool(tmp_path, FEWER[mode])
    found = run(pool, mode, system, tmp_path)
    if mode in FEWER:
        pool.stop()
    assert found.pop("moved") > 1e-3  # the weights were trained
    assert {name: error for name, error in found.items() if not error <= LIMIT} == {}


def test_the_table_has_every_combination_within_the_limit() -> None:
    rows = [
        line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.count("|") == 3 + len(COLUMNS) + 1
    ]
    table = {(row[0].strip(), row[1].strip()): [float(value) for value in row[2:]] for row in rows[2:]}
    assert sorted(table) == sorted(ALL)
    for case, (processes, *errors) in table.items():
        assert processes == FEWER.get(case[0], 4) and len(errors) == len(COLUMNS) and max(errors) <= LIMIT, case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/parallel.md")
    parser.add_argument("--pools", type=int, default=1, help="combinations at once, on 2 to 4 processes each")
    options = parser.parse_args()
    lines = ["| mode | system | processes | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        pools: dict[int, queue.Queue[Pool]] = {world: queue.Queue() for world in (2, 3, 4)}
        for world, number in product(pools, range(options.pools)):
            folder = Path(scratch) / f"pool{world}_{number}"
            folder.mkdir()
            pools[world].put(Pool(folder, world))

        def one(case: tuple[str, str]) -> str:
            world = FEWER.get(case[0], 4)
            pool = pools[world].get()
            try:
                found = run(pool, *case, Path(scratch) / str(ALL.index(case)))
            except AssertionError as error:
                return f"{case}: {str(error)[-3000:]}"
            finally:
                pools[world].put(pool)
            return f"| {case[0]} | {case[1]} | {world} | " + " | ".join(f"{found[name]:.1e}" for name in COLUMNS) + " |"

        with ThreadPoolExecutor(options.pools) as threads:
            for line in threads.map(one, ALL):
                lines.append(line)
                print(line, flush=True)
        for free in pools.values():
            while not free.empty():
                free.get().stop()
    if options.write:
        text = DOCUMENT.read_text()
        begin, end = text.index("<!-- table -->"), text.index("<!-- end -->")
        DOCUMENT.write_text(text[:begin] + "<!-- table -->\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
