# SPDX-License-Identifier: Apache-2.0
"""Reading clips: the right frames from both backends, and a VideoError for everything that is no sound clip."""

import importlib.util
import random
import struct
import sys

import av
import pytest
import torch
from PIL import Image

from vidgen.data.video import VideoError, open_video

from .conftest import CLIPS

has_decord = importlib.util.find_spec("decord") is not None
needs_decord = pytest.mark.skipif(not has_decord, reason="decord is not installed")
BACKENDS = ["pyav", "decord"] if has_decord else ["pyav"]


def decoded(path) -> torch.Tensor:
    """Every frame, decoded in order by PyAV with nothing of ours in between."""
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def some_numbers(num_frames: int, seed: int = 0) -> list[list[int]]:
    """Requests that go forwards, backwards, and far apart, with repeats."""
    draw = random.Random(seed)
    requests = [draw.choices(range(num_frames), k=k) for k in (1, 1, 1, 2, 5)]
    return [*requests, list(range(0, num_frames, 7)), [num_frames - 1, 0], [3, 3]]


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_frame_by_frame_from_both_backends(clips, name):
    expected = decoded(clips / name)
    requests = some_numbers(len(expected))[: 1 if name == "bigbuckbunny.mp4" else None]  # large, and one key frame
    for backend in BACKENDS:
        with open_video(clips / name, backend) as reader:
            assert (reader.num_frames, reader.height, reader.width) == expected.shape[:3]
            assert reader.fps == pytest.approx(25 if name[0] == "b" else 30000 / 1001, abs=1e-9)
            assert reader.backend == backend
            frames = reader.frames(range(reader.num_frames))
            assert frames.dtype == torch.uint8 and torch.equal(frames, expected)
            for numbers in requests:
                assert torch.equal(reader.frames(numbers), expected[numbers]), numbers


@needs_decord
def test_auto_takes_decord_for_sound_clips_and_pyav_for_damaged_ones(clip):
    with open_video(clip) as reader:
        assert reader.backend == "decord"
    content = bytearray(clip.read_bytes())
    content[200_000:201_000] = bytes(1000)
    clip.write_bytes(content)
    with open_video(clip) as reader:
        assert reader.backend == "pyav"
        assert reader.frames([0, 249]).shape == (2, 272, 640, 3)
        with pytest.raises(VideoError, match="broken stream|damaged"):
            reader.frames(range(90, 100))
    with pytest.raises(VideoError, match="decord is not exact"):
        open_video(clip, "decord")


def test_auto_without_decord(clips, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "decord" else find(name))
    monkeypatch.setitem(sys.modules, "decord", None)
    with open_video(clips / CLIPS[2]) as reader:
        assert reader.backend == "pyav"
    with pytest.raises(ImportError, match=r"vidgen\[video\]"):
        open_video(clips / CLIPS[2], "decord")


# Ways to write a file, and whether decord is exact on it.
FILES = {
    "plain": ("a.mp4", {}, True),
    "many B frames": ("a.mp4", {"x264-params": "bframes=8:keyint=250"}, True),
    "open groups": ("a.mp4", {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}, False),
    "intra refresh": ("a.mp4", {"x264-params": "intra-refresh=1:keyint=12"}, False),
    "full range": ("a.mp4", {"pix_fmt": "yuvj420p"}, True),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p"}, True),
    "10 bits": ("a.mp4", {"pix_fmt": "yuv420p10le"}, False),
    "fragments": ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}, True),
    "variable rate": ("a.mp4", {"times": [7 * i * i for i in range(40)]}, True),
    "late start": ("a.mp4", {"times": [3000 + 40 * i for i in range(40)]}, True),
    "mpeg4": ("a.mp4", {"codec": "mpeg4"}, True),
    "mov": ("a.mov", {}, True),
    "matroska": ("a.mkv", {}, False),
    "webm": ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}, False),
    "avi": ("a.avi", {"codec": "mpeg4"}, False),
    "avi without times": ("a.avi", {}, False),
    "transport stream": ("a.ts", {}, False),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files(encode, kind):
    name, options, exact = FILES[kind]
    path = encode(name, **options)
    expected = decoded(path)
    with open_video(path, "pyav") as reader:
        assert reader.num_frames == len(expected) == 40
        assert torch.equal(reader.frames(range(40)), expected)
        for numbers in some_numbers(40):
            assert torch.equal(reader.frames(numbers), expected[numbers]), numbers
    if not has_decord:
        return
    with open_video(path) as reader:
        assert reader.backend == ("decord" if exact else "pyav")
        for numbers in some_numbers(40, seed=1):
            assert torch.equal(reader.frames(numbers), expected[numbers]), numbers


def test_edit_list_hides_frames(encode, tmp_path):
    source, path = encode("a.mp4", bf="0"), tmp_path / "cut.mp4"
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as full, av.open(str(path), "w", options=options) as cut:
        stream = cut.add_stream_from_template(full.streams.video[0])
        for packet in full.demux(video=0):
            if packet.dts is not None:
                packet.pts -= 7 * 512
                packet.dts -= 7 * 512
                packet.stream = stream
                cut.mux(packet)
    with open_video(path) as reader:
        assert reader.num_frames == 33 and reader.backend == "pyav"
        assert torch.equal(reader.frames([0, 32, 5]), decoded(source)[[7, 39, 12]])


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_rotated_clip_stands_upright(encode, backend):
    path = encode("a.mp4")
    expected = torch.rot90(decoded(path), -1, (1, 2))  # a quarter turn clockwise
    content = bytearray(path.read_bytes())
    matrix = content.find(b"tkhd") + 44
    assert struct.unpack(">9i", content[matrix : matrix + 36])[0] == 65536
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content)
    with open_video(path, backend) as reader:
        assert (reader.height, reader.width) == (64, 48)
        assert torch.equal(reader.frames([0, 20]), expected[[0, 20]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_and_closing(clips, backend):
    with open_video(clips / CLIPS[2], backend) as reader:
        assert reader.frames([]).shape == (0, 144, 176, 3)
        for number in (-1, 120):
            with pytest.raises(IndexError, match=f"frame {number} wanted, the clip has 120"):
                reader.frames([0, number])
    reader.close()
    with pytest.raises(VideoError, match="closed"):
        reader.frames([0])


def test_unknown_backend(clips):
    with pytest.raises(ValueError, match="backend must be"):
        open_video(clips / CLIPS[0], "opencv")


def broken(kind: str, content: bytes) -> bytes:
    """A sound clip's bytes, damaged."""
    changed = bytearray(content)
    if kind == "flipped":
        draw = random.Random(0)
        for _ in range(100):
            changed[draw.randrange(5000, len(content) - 5000)] ^= 1 << draw.randrange(8)
    elif kind == "hole":
        changed[50_000:250_000] = bytes(200_000)
    elif kind == "table":
        changed[content.find(b"stsz") + 8 : content.find(b"stsz") + 400] = b"\xff" * 392
    simple = {
        "empty": b"",
        "zeroed": bytes(len(content)),
        "half": content[: len(content) // 2],
        "without index": content[:-5000],
        "header only": content[:32],
        "text": b"hello world\n" * 100,
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nclip2.mp4\n#EXT-X-ENDLIST\n",
        "script": b"ffconcat version 1.0\nfile clip2.mp4\n",
    }
    return simple.get(kind, bytes(changed))


@pytest.mark.parametrize(
    "kind",
    [
        "flipped",
        "hole",
        "table",
        "empty",
        "zeroed",
        "half",
        "without index",
        "header only",
        "text",
        "playlist",
        "script",
    ],
)
@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_broken_clips(clip, kind, backend):
    content = clip.read_bytes()
    (clip.parent / "clip2.mp4").write_bytes(content)
    clip.write_bytes(broken(kind, content))
    with pytest.raises(VideoError, match=f"^{clip}: "), open_video(clip, backend) as reader:
        reader.frames(range(reader.num_frames))


@pytest.mark.parametrize("part", [0.4, 0.7, 0.85])
@pytest.mark.parametrize("kind", ["mp4", "fragments", "matroska", "webm", "avi", "avi without times"])
def test_truncated_files_whose_index_is_not_at_the_end(encode, kind, part):
    name, options = ("a.mp4", {"movflags": "faststart"}) if kind == "mp4" else FILES[kind][:2]
    path = encode(name, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(VideoError, match="truncated|broken|damaged|not a readable video"):
        open_video(path)


def test_a_few_bytes_of_the_last_frame_cut_off(encode):
    path = encode("a.mp4", movflags="faststart")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(VideoError, match="truncated in frame 39"):
        open_video(path)


def test_damage_that_decoders_conceal_unless_told_not_to(encode):
    path = encode("a.avi", codec="mjpeg", pix_fmt="yuvj420p")
    content = path.read_bytes()
    draw = random.Random(0)
    concealed = 0
    for _ in range(20):
        changed = bytearray(content)
        changed[draw.randrange(len(changed) // 3, len(changed) * 2 // 3)] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            with av.open(str(path)) as container:
                assert len(list(container.decode(video=0))) == 40
        except av.error.FFmpegError:
            continue
        try:
            open_video(path)
        except VideoError:
            concealed += 1
    assert concealed > 0


def test_index_in_front_and_nothing_behind_it(encode):
    path = encode("a.mp4", movflags="faststart")
    content = path.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    path.write_bytes(content[: content.find(b"mdat") + 4])
    with pytest.raises(VideoError, match="truncated|no frames"):
        open_video(path)


def test_things_that_are_no_clips(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.jpg")
    (tmp_path / "image.jpg").rename(tmp_path / "image.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame(format="fltp", layout="mono", samples=4410)
        sound.rate = 44100
        sound.planes[0].update(bytes(4410 * 4))
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    (tmp_path / "folder.mp4").mkdir()
    for name, message in {
        "image.mp4": "not a readable video",
        "sound.mp4": "no video stream",
        "folder.mp4": "no such file",
        "none.mp4": "no such file|No such file",
    }.items():
        for backend in ("auto", "pyav"):
            with pytest.raises(VideoError, match=message):
                open_video(tmp_path / name, backend)


def test_a_frame_larger_than_allowed_is_refused(clip, monkeypatch):
    monkeypatch.setattr("vidgen.data.video.MAX_PIXELS", 100 * 100)
    with pytest.raises(VideoError):
        open_video(clip, "pyav")


def test_random_damage_gives_a_video_error_or_frames(clips, tmp_path):
    content = (clips / "carphone_distorted.mp4").read_bytes()
    draw = random.Random(1)
    outcomes = {"error": 0, "frames": 0}
    for number in range(40):
        changed = bytearray(content)
        first = 0 if number % 2 else content.find(b"moov")
        for _ in range(draw.choice([1, 3, 10, 50])):
            changed[draw.randrange(first, len(content))] = draw.randrange(256)
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(changed)
        try:
            with open_video(path) as reader:
                reader.frames(range(min(reader.num_frames, 200)))
            outcomes["frames"] += 1
        except VideoError:
            outcomes["error"] += 1
    assert outcomes["error"] > 10
