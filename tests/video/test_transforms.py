# SPDX-License-Identifier: Apache-2.0
"""Which frames, which part of the picture, which size."""

import pytest
import torch
import torch.nn.functional as F

from vidgen.data.transforms import center_crop, crop_box, frame_indices, resize_crop, to_frames
from vidgen.data.video import VideoError


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((100, 24, 24, 5), [0, 1, 2, 3, 4]),
        ((100, 24.05, 24, 5), [0, 1, 2, 3, 4]),  # less than 0.1 apart: taken as equal
        ((100, 23.976, 24, 5), [0, 1, 2, 3, 4]),
        ((100, 48, 24, 5), [0, 2, 4, 6, 8]),
        ((100, 60, 24, 5), [0, 2, 5, 7, 10]),
        ((100, 30, None, 3), [0, 1, 2]),
        ((9, 48, 24, 5), [0, 2, 4, 6, 8]),
    ],
)
def test_frame_indices(arguments, expected):
    assert frame_indices(*arguments) == expected
    assert frame_indices(*arguments, start=10) == [10 + i for i in expected]


def test_frame_indices_draws_every_place_and_stays_inside():
    generator = torch.Generator().manual_seed(0)
    drawn = [frame_indices(10, 48, 24, 3, start=100, generator=generator) for _ in range(100)]
    assert {tuple(d) for d in drawn} == {(100, 102, 104), (102, 104, 106), (104, 106, 108)}
    again = torch.Generator().manual_seed(0)
    assert drawn[:10] == [frame_indices(10, 48, 24, 3, start=100, generator=again) for _ in range(10)]


def test_frame_indices_never_leaves_the_clip():
    for fps in (24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 120.0):
        for num_frames in range(1, 60):
            try:
                indices = frame_indices(num_frames, fps, 24, 4, start=5)
            except VideoError:
                continue
            assert indices[-1] < 5 + num_frames and len(set(indices)) == 4


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((100, 12, 24, 5), VideoError, "12 frames per second, 24 wanted"),
        ((8, 48, 24, 5), VideoError, "too short: 4 frames at the wanted rate, 5 wanted"),
        ((100, 24, 24, 0), ValueError, "count must be positive"),
        ((100, 0, 24, 1), ValueError, "fps and train_fps must be positive"),
        ((100, 24, -1, 1), ValueError, "fps and train_fps must be positive"),
    ],
)
def test_frame_indices_refuses(arguments, kind, message):
    with pytest.raises(kind, match=message):
        frame_indices(*arguments)


@pytest.mark.parametrize(
    "size, target, rows, columns",
    [
        ((10, 20), (8, 8), (0, 10), (5, 15)),
        ((20, 10), (4, 8), (8, 13), (0, 10)),  # round(7.5) is 8
        ((9, 16), (90, 160), (0, 9), (0, 16)),
        ((7, 7), (1, 100), (3, 4), (0, 7)),
    ],
)
def test_center_crop(size, target, rows, columns):
    frames = torch.arange(size[0] * size[1] * 3).view(1, *size, 3)
    assert torch.equal(center_crop(frames, *target), frames[:, slice(*rows), slice(*columns)])


def test_resize_crop_is_the_stated_formula():
    frames = torch.randint(0, 256, (3, 20, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = resize_crop(frames, 8, 12)
    assert video.shape == (3, 3, 8, 12) and video.dtype == torch.float32
    crop = frames[:, :, 5:35].permute(0, 3, 1, 2) / 255
    expected = F.interpolate(crop, (8, 12), mode="bicubic", align_corners=True, antialias=True) * 2 - 1
    torch.testing.assert_close(video, expected.transpose(0, 1).clamp(-1, 1))


def test_resize_crop_range_and_identity():
    edge = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    edge[:, :, 8:] = 255
    video = resize_crop(edge, 32, 32)  # bicubic overshoots at the edge
    assert video.min() == -1 and video.max() == 1
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_frames(resize_crop(frames, 16, 16)), frames)


def test_resize_crop_refuses():
    with pytest.raises(ValueError, match="must be uint8"):
        resize_crop(torch.zeros(1, 4, 4, 3), 4, 4)
    with pytest.raises(ValueError, match="height and width must be positive"):
        resize_crop(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 0, 4)


def test_to_frames():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_frames(video)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_frames(video.bfloat16()).shape == (5, 1, 1, 3)
    with pytest.raises(ValueError, match="NaN"):
        to_frames(video * float("nan"))
    with pytest.raises(ValueError, match="floating point"):
        to_frames(video.transpose(0, 1))


def test_crop_box():
    frames = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3)
    assert torch.equal(crop_box(frames, (1, 5, 2, 4)), frames[:, 2:4, 1:5])
    with pytest.raises(VideoError, match="does not lie inside a picture of 6 x 8"):
        crop_box(frames, (1, 9, 2, 4))
