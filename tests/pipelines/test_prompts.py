# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from vidgen.pipelines.prompts import read_references, read_requests, with_references
from vidgen.pipelines.settings import Request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "clip.mp4"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_prompt_per_line_with_or_without_an_image(folder):
    (folder / "prompts.txt").write_text("a cat@@a.png\n\n a dog \nbirds @@ elsewhere/c.png\n")
    assert read_requests(folder / "prompts.txt") == [
        Request("a cat", (folder / "a.png",)),
        Request("a dog"),
        Request("birds", (Path("elsewhere/c.png"),)),
    ]


def test_csv_of_open_sora_2(folder):
    (folder / "prompts.csv").write_text(
        'text,name,ref,neg,num_frames\n"a cat, running",first,a.png;b.png,blurry,129\na dog,,,,\n,,,,\n'
    )
    assert read_requests(folder / "prompts.csv") == [
        Request("a cat, running", (folder / "a.png", folder / "b.png"), "blurry", "first"),
        Request("a dog"),
    ]


@pytest.mark.parametrize(
    "text, message", [("prompt\na cat\n", "wanted a column text, found prompt"), ("text\n", "no prompts")]
)
def test_csv_without_prompts(folder, text, message):
    (folder / "prompts.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_requests(folder / "prompts.csv")


def test_references_per_line(folder):
    (folder / "images.txt").write_text("a.png\na.png,b.png\nclip.mp4\n")
    listed = read_references(folder / "images.txt")
    assert listed == [(folder / "a.png",), (folder / "a.png", folder / "b.png"), (folder / "clip.mp4",)]
    requests = with_references([Request("x"), Request("y"), Request("z", name="n")], (), listed)
    assert [request.references for request in requests] == listed and requests[2].name == "n"
    with pytest.raises(ValueError, match="given for 3 videos, prompts for 1"):
        with_references([Request("x")], (), listed)


def test_references_for_all_and_in_two_ways(folder):
    shared = [folder / "a.png"]
    assert [r.references for r in with_references([Request("x"), Request("y")], shared)] == [(folder / "a.png",)] * 2
    with pytest.raises(ValueError, match="references of 'x' are given in 2 ways"):
        with_references([Request("x", (folder / "b.png",))], shared)
