# SPDX-License-Identifier: Apache-2.0
"""The four ways to list clips, and everything that can be wrong in them."""

import json
from pathlib import Path

import pytest

from vidgen.data.annotations import Clip, read_annotations


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_annotations(path)
    return str(caught.value)


def test_folder(tmp_path):
    for name in ("b.mp4", "a.webm", "below/c.MP4", "notes.md", ".hidden.mp4"):
        write(tmp_path, name, "")
    for name in ("b", "a", "below/c"):
        write(tmp_path, f"{name}.txt", f" caption of {name}\n")
    assert read_annotations(tmp_path) == [
        Clip(tmp_path / "a.webm", ("caption of a",)),
        Clip(tmp_path / "b.mp4", ("caption of b",)),
        Clip(tmp_path / "below" / "c.MP4", ("caption of below/c",)),
    ]


def test_folder_problems(tmp_path):
    assert "no clips" in problems(tmp_path)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write(tmp_path, name, "")
    write(tmp_path, "b.txt", " \n")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    text = problems(tmp_path)
    assert "3 problems" in text
    assert "a.txt is missing" in text and "b.txt: empty" in text and "c.txt: not UTF-8" in text


@pytest.mark.parametrize("column", ["caption", "cap", "text"])
def test_csv(tmp_path, column):
    text = f'\ufeffid,path,{column}\n1,a.mp4,"a cat, asleep\non a mat"\n2,/data/b.mp4,ü\n'
    path = write(tmp_path, "list.csv", text)
    assert read_annotations(path) == [
        Clip(tmp_path / "a.mp4", ("a cat, asleep\non a mat",)),
        Clip(Path("/data/b.mp4"), ("ü",)),
    ]


def test_csv_problems_name_lines(tmp_path):
    text = problems(write(tmp_path, "list.csv", "path,cap\na.mp4,x\nb.mp4\n,y\nc.mp4,\nd.jpg,z\ne.mp4,x,y\n"))
    assert "5 problems" in text
    for line in (
        "line 3: wanted 2 columns",
        "line 4: path: wanted text",
        "line 5: cap: wanted text",
        "line 6: path: d.jpg",
    ):
        assert f"list.csv {line}" in text
    assert "line 7: wanted 2 columns" in text
    assert "no caption" in problems(write(tmp_path, "other.csv", "path,words\na.mp4,x\n"))
    assert "after line 1" in problems(write(tmp_path, "quote.csv", 'path,cap\na.mp4,"x\n'))


RECORDS = [
    {
        "path": "a.mp4",
        "cap": ["one", "two"],
        "resolution": {"height": 4, "width": 4},
        "cut": [3, 9],
        "crop": [0, 4, 1, 3],
    },
    {"path": "b.mp4", "caption": "line\u2028separator", "cut": [5], "aesthetic": 5.0},
]


def expected(folder: Path) -> list[Clip]:
    return [
        Clip(folder / "a.mp4", ("one", "two"), 3, 9, (0, 4, 1, 3)),
        Clip(folder / "b.mp4", ("line\u2028separator",), 5),
    ]


def test_json_and_jsonl(tmp_path):
    write(tmp_path, "list.json", json.dumps(RECORDS))
    write(tmp_path, "list.jsonl", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n")
    for name in ("list.json", "list.jsonl"):
        assert read_annotations(tmp_path / name) == expected(tmp_path)


def test_json_problems(tmp_path):
    lines = [
        '{"path": "a.mp4", "cap": "x"}',
        '{"path": "a.mp4", "path": "b.mp4", "cap": "x"}',
        '{"path": "a.mp4", "cap": []}',
        '{"path": "a.mp4", "cap": ["x", 3]}',
        '{"path": 3, "cap": "x"}',
        '{"cap": "x"}',
        "[1]",
        "{",
        '{"path": "a.mp4", "cap": "x", "cut": [9, 3]}',
        '{"path": "a.mp4", "cap": "x", "cut": [-1]}',
        '{"path": "a.mp4", "cap": "x", "crop": [0, 4, 4]}',
    ]
    text = problems(write(tmp_path, "list.jsonl", "\n".join(lines)))
    assert "10 problems" in text
    for number in range(2, 12):
        assert f"list.jsonl line {number}: " in text
    assert "list.json record 1: wanted an object" in problems(
        write(tmp_path, "list.json", '[{"path": "a.mp4", "cap": "x"}, 2]')
    )
    assert "wanted a list of records, got dict" in problems(write(tmp_path, "list.json", "{}"))
    assert "Expecting" in problems(write(tmp_path, "list.json", ""))


def test_open_sora_plan_list(tmp_path):
    write(tmp_path, "lists/one.json", json.dumps(RECORDS))
    write(tmp_path, "lists/two.jsonl", json.dumps({"path": "c.mp4", "cap": "x"}))
    path = write(tmp_path, "data.txt", "clips,lists/one.json\n\n/elsewhere , lists/two.jsonl\n")
    assert read_annotations(path) == [*expected(tmp_path / "clips"), Clip(Path("/elsewhere/c.mp4"), ("x",))]


def test_open_sora_plan_list_problems(tmp_path):
    write(tmp_path, "one.json", json.dumps([{"path": "image.jpg", "cap": "x"}]))
    write(tmp_path, "two.pkl", "")
    text = problems(write(tmp_path, "data.txt", "clips\nclips,none.json\nclips,one.json\nclips,two.pkl\n"))
    assert "data.txt line 1: wanted folder,annotation.json, got 'clips'" in text
    assert "data.txt line 2:" in text and "none.json: no such file" in text
    assert "one.json record 0: path: image.jpg: not a clip" in text
    assert "two.pkl: a pickle can run any program" in text


def test_long_lists_of_problems_are_cut(tmp_path):
    text = problems(write(tmp_path, "list.jsonl", "x\n" * 50))
    assert "50 problems" in text and "and 30 more" in text and text.count("line ") < 50


def test_unknown_forms(tmp_path):
    assert "no such file or folder" in problems(tmp_path / "none.csv")
    assert "wanted a folder, or a .csv" in problems(write(tmp_path, "list.xml", ""))
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in problems(tmp_path / "bad.json")
