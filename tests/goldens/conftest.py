# SPDX-License-Identifier: Apache-2.0
"""Collects one test per golden case, and prints the largest error of each at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .comparison import Worst

WORST = pytest.StashKey[list[Worst]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WORST] = []


@pytest.fixture
def worst_errors(request: pytest.FixtureRequest) -> list[Worst]:
    return request.config.stash[WORST]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        files = golden_files(metafunc.config.getoption("--goldens"))
        metafunc.parametrize("golden_file", files, ids=[f"{file.parent.name}/{file.stem}" for file in files])


def golden_files(folder: Path) -> list[Path]:
    """Every case below ``folder``, which is laid out as ``<system>/<case>.json`` or is one system's folder.

    Raises:
        pytest.UsageError: no folder, or no case in it.
    """
    folder = folder.resolve()  # a system's folder given as "." must still have its name
    if not folder.is_dir():
        raise pytest.UsageError(f"--goldens {folder} is not a folder")
    files = [file for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]) if not _is_index(file)]
    if not files:
        raise pytest.UsageError(f"--goldens {folder} has no <system>/<case>.json")
    return files


def _is_index(file: Path) -> bool:
    meta = json.loads(file.read_text())
    return isinstance(meta, dict) and meta.get("kind") == "index"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    worst = config.stash[WORST]
    if not worst:
        return
    terminalreporter.section("golden cases: largest error")
    width = max(len(entry.label) for entry in worst)
    terminalreporter.line(f"{'case':{width}}  {'kind':22}  {'max error':>9}  {'of tolerance':>12}  worst output")
    for entry in worst:
        line = f"{entry.label:{width}}  {entry.kind:22}  {entry.error:9.2e}  {entry.share:11.1%}  {entry.output}"
        terminalreporter.line(line + ("  FAILED" if entry.failures else ""))
