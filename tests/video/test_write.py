# SPDX-License-Identifier: Apache-2.0
"""Writing: mp4 files that a browser plays, and contact sheets."""

import av
import pytest
import torch
from PIL import Image

from vidgen.data.video import contact_sheet, open_video, write_video

from .conftest import moving_squares


def test_mp4_for_browsers(tmp_path):
    frames = moving_squares(num_frames=10, height=48, width=72)  # rows that the encoder pads
    path = tmp_path / "out.mp4"
    write_video(path, frames, fps=30000 / 1001)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")  # faststart
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == ("h264", "yuv420p", 5, 1)
    with open_video(path) as reader:
        assert (reader.num_frames, reader.height, reader.width) == (10, 48, 72)
        assert reader.fps == 30000 / 1001
        read = reader.frames(range(10))
    error = (read.float() - frames.float()).abs()
    assert error.mean() < 6  # what halved colour and compression cost; a wrong frame or colour order costs > 20


def test_whole_and_uneven_rates(tmp_path):
    for fps in (24, 25.0, 7.5, 23.976):
        write_video(tmp_path / "out.mp4", moving_squares(3), fps=fps)
        with open_video(tmp_path / "out.mp4") as reader:
            assert reader.fps == pytest.approx(fps, abs=1e-3)


def test_one_frame(tmp_path):
    write_video(tmp_path / "out.mp4", moving_squares(1), fps=8)
    with open_video(tmp_path / "out.mp4") as reader:
        assert reader.num_frames == 1


@pytest.mark.parametrize(
    "name, frames, arguments, message",
    [
        ("a.mp4", torch.zeros(2, 47, 64, 3, dtype=torch.uint8), {}, "must be even, got 47 x 64"),
        ("a.mp4", torch.zeros(2, 48, 64, 3), {}, "must be uint8"),
        ("a.mp4", torch.zeros(2, 3, 48, 64, dtype=torch.uint8), {}, "must be uint8"),
        ("a.mp4", torch.zeros(0, 48, 64, 3, dtype=torch.uint8), {}, "at least one frame"),
        ("a.avi", torch.zeros(2, 48, 64, 3, dtype=torch.uint8), {}, "must end in .mp4"),
        ("a.mp4", torch.zeros(2, 48, 64, 3, dtype=torch.uint8), {"fps": 0}, "fps must be positive"),
        ("a.mp4", torch.zeros(2, 48, 64, 3, dtype=torch.uint8), {"fps": float("nan")}, "fps must be positive"),
        ("a.mp4", torch.zeros(2, 48, 64, 3, dtype=torch.uint8), {"crf": 60}, "crf must be from 0 to 51"),
    ],
)
def test_write_video_refuses(tmp_path, name, frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, **{"fps": 8, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet_shows_every_kth_frame(tmp_path):
    first, second = moving_squares(7), moving_squares(4, height=32, width=32)
    contact_sheet(tmp_path / "sheet.png", [("a cat\nasleep", first), ("ein Löwe, 狮子", second)], every=3)
    sheet = torch.frombuffer(bytearray(Image.open(tmp_path / "sheet.png").convert("RGB").tobytes()), dtype=torch.uint8)
    sheet = sheet.view(16 + 48 + 4 + 16 + 32 + 4 + 4, 4 + 3 * (64 + 4), 3)
    for column, number in enumerate((0, 3, 6)):
        left = 4 + column * 68
        assert torch.equal(sheet[16 : 16 + 48, left : left + 64], first[number])
    for column, number in enumerate((0, 3)):
        left = 4 + column * 36
        assert torch.equal(sheet[84 : 84 + 32, left : left + 32], second[number])
    assert (sheet[:16] < 128).any()  # the label


def test_contact_sheet_refuses(tmp_path):
    with pytest.raises(ValueError, match="rows must not be empty"):
        contact_sheet(tmp_path / "sheet.png", [])
    with pytest.raises(ValueError, match="every must be at least 1"):
        contact_sheet(tmp_path / "sheet.png", [("a", moving_squares(1))], every=0)
    with pytest.raises(ValueError, match="must be uint8"):
        contact_sheet(tmp_path / "sheet.png", [("a", torch.zeros(1, 4, 4, 3))])
