# SPDX-License-Identifier: Apache-2.0
"""Samples: their content, the replacement of broken clips, and order that survives workers and resuming."""

import itertools
import json
import logging
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from vidgen.data.dataset import BrokenClipsError, Clip, ClipDataset, ShuffledSampler
from vidgen.data.transforms import resize_crop
from vidgen.data.video import open_video, write_video

from .conftest import moving_squares


def take(iterable, count):
    return list(itertools.islice(iterable, count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight small sound clips that differ, 25 frames each."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(8):
        write_video(folder / f"{number}.mp4", moving_squares(25) + 31 * number, fps=24)
    return folder


def sound(folder, count=8):
    return [Clip(folder / f"{number}.mp4", (f"clip {number}", f"number {number}")) for number in range(count)]


def dataset(clips, **options):
    settings = {"num_frames": 5, "height": 16, "width": 24, "fps": 12, "seed": 3, **options}
    return ClipDataset(clips, **settings)


def same(first, second):
    return torch.equal(first["video"], second["video"]) and all(
        first[key] == second[key] for key in ("caption", "path", "replaced")
    )


def test_item(folder):
    samples = dataset(sound(folder))
    item = samples[2]
    assert item["video"].shape == (3, 5, 16, 24) and item["video"].dtype == torch.float32
    assert item["path"] == str(folder / "2.mp4") and item["caption"] in ("clip 2", "number 2")
    assert item["replaced"] == "[]" and samples.broken == {}
    with open_video(folder / "2.mp4") as reader:
        every = resize_crop(reader.frames(range(25)), 16, 24)
    places = [first for first in range(17) if torch.equal(every[:, first : first + 9 : 2], item["video"])]
    assert len(places) == 1


def test_item_follows_from_seed_epoch_and_index(folder):
    one, two = dataset(sound(folder)), dataset(sound(folder))
    assert all(same(one[i], two[i]) for i in (7, 0, 8, 15))
    epochs = [one[epoch * 8 + 1] for epoch in range(12)]
    assert {item["path"] for item in epochs} == {str(folder / "1.mp4")}
    assert {item["caption"] for item in epochs} == {"clip 1", "number 1"}
    assert len({item["video"].sum().item() for item in epochs}) > 3
    other = dataset(sound(folder), seed=4)
    assert not all(same(one[i], other[i]) for i in range(8))


def test_cut_and_crop(folder):
    clip = Clip(folder / "0.mp4", ("x",), start=4, stop=9, crop=(8, 32, 16, 32))
    item = dataset([clip], fps=None)[0]
    with open_video(folder / "0.mp4") as reader:
        frames = reader.frames(range(4, 9))
    assert torch.equal(item["video"], resize_crop(frames[:, 16:32, 8:32], 16, 24))


def spoil(folder, tmp_path, kinds):
    """Sound clips with some of them broken in the given ways."""
    clips = sound(folder)
    for number, kind in kinds.items():
        path = tmp_path / f"{number}.mp4"
        content = (folder / f"{number}.mp4").read_bytes()
        if kind != "missing":
            path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "zeroed": bytes(len(content))}[kind])
        clips[number] = Clip(path, (f"clip {number}",))
    return clips


def test_broken_clips_are_replaced_counted_and_listed(folder, tmp_path, caplog):
    kinds = {1: "empty", 3: "half", 4: "missing", 6: "zeroed"}
    clips = spoil(folder, tmp_path, kinds)
    samples = dataset(clips, max_broken_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        items = [samples[i] for i in range(16)]
    assert set(samples.broken) == {str(clips[i].path) for i in kinds}
    assert samples.broken[str(clips[4].path)].lower().startswith("no such file")
    assert len(caplog.records) == 4
    for i, item in enumerate(items):
        notes = json.loads(item["replaced"])
        assert (notes != []) == (i % 8 in kinds)
        assert item["path"] in {str(clip.path) for n, clip in enumerate(clips) if n not in kinds}
        if notes:
            assert notes[0][0] == str(clips[i % 8].path)
    # the same ones whatever was read before
    fresh = dataset(clips, max_broken_fraction=0.5)
    assert all(same(fresh[i], items[i]) for i in (15, 6, 3, 0))


def test_clip_damaged_in_one_part_does_not_make_samples_depend_on_history(clips, tmp_path):
    content = bytearray((clips / "bikes.mp4").read_bytes())
    content[200_000:201_000] = bytes(1000)  # about frame 97 of 250
    (tmp_path / "hole.mp4").write_bytes(content)
    shutil.copy(clips / "carphone_distorted.mp4", tmp_path / "sound.mp4")
    names = [Clip(tmp_path / "hole.mp4", ("a",)), Clip(tmp_path / "sound.mp4", ("b",))]
    samples = dataset(names, fps=None, num_frames=60)
    indices = range(0, 12, 2)
    items = [samples[i] for i in indices]
    assert {item["path"] for item in items} == {str(clip.path) for clip in names}  # both outcomes happen
    for i, item in zip(reversed(indices), reversed(items), strict=True):
        assert same(dataset(names, fps=None, num_frames=60)[i], item)


def test_short_and_slow_clips_and_bad_parts_are_replaced(folder):
    good = sound(folder, 4)
    bad = [Clip(folder / "4.mp4", ("x",), start=20), Clip(folder / "5.mp4", ("x",), start=3, stop=30)]
    bad += [Clip(folder / "6.mp4", ("x",), crop=(0, 100, 0, 10))]
    samples = dataset(good + bad, max_broken_fraction=1)
    assert [json.loads(samples[i]["replaced"])[0][1].split(",")[0] for i in (4, 5, 6)] == [
        "too short: 3 frames at the wanted rate",
        "frames 3 to 30 wanted",
        "crop (0",
    ]
    assert f"{folder}/4.mp4 frames 20 to end" in samples.broken
    slow = dataset(good, fps=48, max_broken_fraction=1)
    with pytest.raises(BrokenClipsError, match="24 frames per second, 48 wanted"):
        slow[0]


def test_too_many_broken_clips_stop_the_run(folder, tmp_path):
    clips = spoil(folder, tmp_path, {1: "empty", 3: "half"})
    samples = dataset(clips)
    samples[1]  # one is always allowed
    with pytest.raises(BrokenClipsError, match=r"2 of 8 clips cannot be used, 1 may be replaced:\n.*1.mp4.*\n.*3.mp4"):
        samples[3]
    strict = dataset([Clip(tmp_path / "none.mp4", ("x",))], max_broken_fraction=1)
    with pytest.raises(BrokenClipsError, match="1 of 1 clips"):
        strict[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_workers(folder, tmp_path, workers):
    clips = spoil(folder, tmp_path, {3: "half"})
    samples = dataset(clips)
    loader = DataLoader(samples, batch_size=3, sampler=ShuffledSampler(8, seed=1), num_workers=workers)
    batches = take(loader, 6)
    indices = take(ShuffledSampler(8, seed=1), 18)
    for number, batch in enumerate(batches):
        assert batch["video"].shape == (3, 3, 5, 16, 24)
        samples.note_replaced(batch["replaced"])
        for row, index in enumerate(indices[3 * number : 3 * number + 3]):
            item = dataset(clips)[index]
            assert torch.equal(batch["video"][row], item["video"]) and batch["path"][row] == item["path"]
    assert set(samples.broken) == {str(clips[3].path)}
    with pytest.raises(BrokenClipsError):
        samples.note_replaced([json.dumps([["another.mp4", "empty"]])])


def test_broken_clips_error_comes_out_of_a_worker(folder, tmp_path):
    clips = spoil(folder, tmp_path, dict.fromkeys(range(8), "empty"))
    loader = DataLoader(dataset(clips), num_workers=1)
    with pytest.raises(BrokenClipsError, match="clips cannot be used"):
        next(iter(loader))


def test_sampler_visits_everything_once_an_epoch():
    order = take(ShuffledSampler(10, seed=5), 30)
    epochs = [order[k : k + 10] for k in (0, 10, 20)]
    for epoch, indices in enumerate(epochs):
        assert sorted(indices) == list(range(10 * epoch, 10 * epoch + 10))
    assert len({tuple(i % 10 for i in indices) for indices in epochs}) == 3
    assert take(ShuffledSampler(10, seed=5), 30) == order != take(ShuffledSampler(10, seed=6), 30)


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 25])
def test_sampler_goes_on_where_it_was(start):
    order = take(ShuffledSampler(10, seed=5), 60)
    assert take(ShuffledSampler(10, seed=5, start=start), 30) == order[start : start + 30]


def test_refusals(folder):
    with pytest.raises(ValueError, match="clips must not be empty"):
        dataset([])
    with pytest.raises(ValueError, match="must be positive"):
        dataset(sound(folder), height=0)
    with pytest.raises(ValueError, match="max_broken_fraction"):
        dataset(sound(folder), max_broken_fraction=2)
    with pytest.raises(IndexError, match="must not be negative"):
        dataset(sound(folder))[-1]
    with pytest.raises(ValueError, match="length must be positive"):
        ShuffledSampler(0)
