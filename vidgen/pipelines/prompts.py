# SPDX-License-Identifier: Apache-2.0
"""Files of prompts, as the original systems read them."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from .settings import Request

PAIR = "@@"  # between a prompt and its image, as CogVideoX writes them
CSV_COLUMNS = ("text", "ref", "neg", "name")  # of Open-Sora 2.0; other columns do not concern sampling


def read_prompts(path: str | Path) -> list[str]:
    """One prompt per line; empty lines do not count. Raises ValueError where none is left."""
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def read_requests(path: str | Path) -> list[Request]:
    """The requests of a file of prompts.

    - ``.csv`` (Open-Sora 2.0): a column ``text``, and where they are there ``ref`` (paths with ``;`` between them),
      ``neg`` (the negative prompt) and ``name`` (of the video's file);
    - anything else: a prompt on each line, or ``prompt@@image`` (CogVideoX).

    Paths are relative to the folder of the file, where there is such a file, and otherwise to the working directory.

    Raises:
        ValueError: no prompts, or no column ``text``.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    pairs = [line.partition(PAIR) for line in read_prompts(path)]
    return [Request(prompt.strip(), _paths(images, path.parent)) for prompt, _, images in pairs]


def read_references(path: str | Path) -> list[tuple[Path, ...]]:
    """One video per line: paths of its references with ``,`` between them (Open-Sora Plan 1.3). See `read_requests`."""
    return [_paths(line, Path(path).parent) for line in read_prompts(path)]


def with_references(
    requests: Sequence[Request], shared: Sequence[Path] = (), listed: Sequence[tuple[Path, ...]] | None = None
) -> list[Request]:
    """The requests with references: the same for all of them, or a list with an entry for each.

    Raises:
        ValueError: a list of another length, or references given in two ways.
    """
    if listed is not None and len(listed) != len(requests):
        raise ValueError(f"sample: references are given for {len(listed)} videos, prompts for {len(requests)}")
    result = []
    for number, request in enumerate(requests):
        ways = [given for given in (request.references, tuple(shared), listed[number] if listed else ()) if given]
        if len(ways) > 1:
            raise ValueError(f"sample: references of {request.prompt!r} are given in {len(ways)} ways; one is enough")
        result.append(Request(request.prompt, ways[0] if ways else (), request.negative_prompt, request.name))
    return result


def _read_csv(path: Path) -> list[Request]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "text" not in (reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ()) or "none"
            raise ValueError(f"{path}: wanted a column text, found {found}")
        rows = [{name: (row.get(name) or "").strip() for name in CSV_COLUMNS} for row in reader]
    requests = [
        Request(row["text"], _paths(row["ref"], path.parent), row["neg"] or None, row["name"] or None)
        for row in rows
        if row["text"]
    ]
    if not requests:
        raise ValueError(f"{path}: no prompts")
    return requests


def _paths(text: str, folder: Path) -> tuple[Path, ...]:
    names = [name.strip() for name in re.split("[,;]", text) if name.strip()]
    return tuple(folder / name if (folder / name).is_file() else Path(name) for name in names)
