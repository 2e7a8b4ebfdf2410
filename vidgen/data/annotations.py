# SPDX-License-Identifier: Apache-2.0
"""Which clips there are and what is said about them: four ways to write that down, told apart by `read_annotations`."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.io import parse_json

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv")
CAPTION_NAMES = ("caption", "cap", "text")
MAX_LISTED = 20  # problems named in one error


@dataclass(frozen=True)
class Clip:
    """A clip, or a part of one, and its captions, of which each reading takes one at random.

    Attributes:
        start, stop: the frames ``start <= i < stop`` of the file; ``stop`` None is the end.
        crop: ``(x0, x1, y0, y1)`` in pixels, or None for the whole picture.
    """

    path: Path
    captions: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    crop: tuple[int, int, int, int] | None = None


def read_annotations(path: str | Path) -> list[Clip]:
    """Read the list of clips at ``path``, whatever form it has.

    - a folder: each clip in it (or below it) has a text file of the same name, ``cat.mp4`` and ``cat.txt``;
    - ``.csv``: columns ``path`` and one of ``caption``, ``cap``, ``text``;
    - ``.jsonl`` (an object a line) or ``.json`` (a list of objects): the same names; a caption may be a list, of which
      one is drawn; Open-Sora Plan's ``cut`` ``[start, stop]`` and ``crop`` ``[x0, x1, y0, y1]`` are honoured;
    - ``.txt`` of Open-Sora Plan: lines ``folder,annotation.json``, the records' paths relative to the folder.

    Relative paths are relative to the file that they stand in (or the folder it names). Whether the clips exist and
    are sound shows when they are read.

    Raises:
        ValueError: all problems at once, each with its file and line or record; also where there is no clip at all.
    """
    path = Path(path)
    problems: list[str] = []
    if path.is_dir():
        clips = list(_read_folder(path, problems))
    elif not path.is_file():
        raise ValueError(f"read_annotations: {path}: no such file or folder")
    elif path.suffix == ".txt":
        clips = list(_read_list_of_annotations(path, problems))
    else:
        clips = list(_read_file(path, path.parent, problems))
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ValueError(
            f"read_annotations: {path}: {len(problems)} problems:\n  " + "\n  ".join(problems[:MAX_LISTED]) + more
        )
    if not clips:
        raise ValueError(f"read_annotations: {path}: no clips")
    return clips


def _read_folder(folder: Path, problems: list[str]) -> Iterator[Clip]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        text = path.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            problems.append(f"{path}: no caption, {text.name} is missing")
        except UnicodeDecodeError:
            problems.append(f"{text}: not UTF-8 text")
        else:
            if caption:
                yield Clip(path, (caption,))
            else:
                problems.append(f"{text}: empty")


def _read_list_of_annotations(path: Path, problems: list[str]) -> Iterator[Clip]:
    for number, line in enumerate((_text(path, problems) or "").splitlines(), 1):
        if not line.strip():
            continue
        folder, comma, name = (part.strip() for part in line.partition(","))
        file = path.parent / name
        if not (folder and comma and name):
            problems.append(f"{path.name} line {number}: wanted folder,annotation.json, got {line.strip()!r}")
        elif not file.is_file():
            problems.append(f"{path.name} line {number}: {file}: no such file")
        else:
            yield from _read_file(file, path.parent / folder, problems)


def _read_file(path: Path, folder: Path, problems: list[str]) -> Iterator[Clip]:
    readers: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, Any]]]] = {
        ".csv": _csv_records,
        ".jsonl": _jsonl_records,
        ".json": _json_records,
    }
    if path.suffix == ".pkl":
        problems.append(f"{path}: a pickle can run any program when it is read; save the annotation as json")
        return
    if path.suffix not in readers:
        problems.append(f"{path}: wanted a folder, or a .csv, .jsonl, .json or .txt file")
        return
    for place, record in readers[path.suffix](path, problems):
        try:
            yield _clip(record, folder)
        except ValueError as error:
            problems.append(f"{path.name} {place}: {error}")


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problems.append(f"{path}: not UTF-8 text")
        return None


def _csv_records(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                place = f"line {reader.line_num}"
                if None in record or None in record.values():
                    problems.append(f"{path.name} {place}: wanted {len(reader.fieldnames or ())} columns")
                else:
                    yield place, {name.strip(): value for name, value in record.items()}
    except csv.Error as error:
        problems.append(f"{path.name} after line {reader.line_num}: {error}")
    except UnicodeDecodeError:
        problems.append(f"{path}: not UTF-8 text")


def _jsonl_records(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    # not splitlines: JSON text may hold the other characters that it takes for line ends
    for number, line in enumerate((_text(path, problems) or "").split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", parse_json(line)
            except ValueError as error:
                problems.append(f"{path.name} line {number}: {error}")


def _json_records(path: Path, problems: list[str]) -> Iterator[tuple[str, Any]]:
    text = _text(path, problems)
    if text is None:
        return
    try:
        records = parse_json(text)
    except ValueError as error:
        problems.append(f"{path.name}: {error}")
        return
    if not isinstance(records, list):
        problems.append(f"{path.name}: wanted a list of records, got {type(records).__name__}")
        return
    for number, record in enumerate(records):
        yield f"record {number}", record


def _clip(record: Any, folder: Path) -> Clip:
    """One record as a `Clip`. Raises ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"wanted an object with path and caption, got {type(record).__name__}")
    name = record.get("path")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"path: wanted text, got {name!r}; the names here are {', '.join(map(str, record))}")
    path = folder / name.strip()
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path: {name}: not a clip; wanted one of {' '.join(SUFFIXES)}")
    keys = [key for key in CAPTION_NAMES if key in record]
    if not keys:
        raise ValueError(f"no caption; wanted one of {', '.join(CAPTION_NAMES)}, got {', '.join(map(str, record))}")
    value = record[keys[0]]
    captions = value if isinstance(value, list) else [value]
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError(f"{keys[0]}: wanted text or a list of texts, got {value!r}")
    start, stop = _cut(record.get("cut"))
    return Clip(path, tuple(caption.strip() for caption in captions), start, stop, _crop(record.get("crop")))


def _integers(value: Any) -> list[int] | None:
    """``value`` if it is a list of integers that are not negative."""
    good = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return value if good else None


def _cut(value: Any) -> tuple[int, int | None]:
    if value is None:
        return 0, None
    numbers = _integers(value)
    if not numbers or len(numbers) > 2 or numbers != sorted(set(numbers)):
        raise ValueError(f"cut: wanted [start] or [start, stop] in frames, got {value!r}")
    return numbers[0], numbers[1] if len(numbers) == 2 else None


def _crop(value: Any) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    numbers = _integers(value)
    if not numbers or len(numbers) != 4 or not (numbers[0] < numbers[1] and numbers[2] < numbers[3]):
        raise ValueError(f"crop: wanted [x0, x1, y0, y1] in pixels, got {value!r}")
    return numbers[0], numbers[1], numbers[2], numbers[3]
