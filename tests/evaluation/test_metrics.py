# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against cases that can be worked out by hand."""

import math

import pytest
import torch

from vidgen.evaluation.metrics import psnr, ssim

pytest.importorskip("torchmetrics")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_difference():
    reference = noise(3, 5, 16, 20) * 0.5
    for difference in (0.5, 0.1, 0.01):
        expected = 10 * math.log10(4 / difference**2)
        assert psnr(reference + difference, reference).item() == pytest.approx(expected, abs=1e-3)
    scaled = psnr((reference + 1.1) / 2, (reference + 1) / 2, low=0.0, high=1.0)
    assert scaled.item() == pytest.approx(10 * math.log10(4 / 0.1**2), abs=1e-3)


def test_psnr_averages_the_error_over_the_whole_video():
    reference = torch.zeros(3, 4, 12, 12)
    video = reference.clone()
    video[:, 0] = 1.0  # one frame of four is off by 1
    assert psnr(video, reference).item() == pytest.approx(10 * math.log10(4 / 0.25), abs=1e-4)


def test_equal_videos():
    video = noise(2, 3, 4, 16, 16)
    assert psnr(video, video).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(video, video), torch.ones(2))


def test_values_outside_the_range_are_clamped():
    reference = torch.ones(3, 2, 16, 16)
    assert psnr(reference * 3, reference).item() == math.inf


def test_ssim_of_two_constant_videos():
    # without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1), c1 = (0.01 * 2)^2
    for a, b in ((0.5, 0.7), (-0.2, 0.9), (0.0, 1.0)):
        c1 = 0.02**2
        expected = (2 * a * b + c1) / (a * a + b * b + c1)
        got = ssim(torch.full((3, 2, 16, 16), a), torch.full((3, 2, 16, 16), b))
        assert got.item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_the_negative():
    # zero mean, equal variance, covariance -variance: close to -1 where the window sees no mean
    board = (torch.arange(32).view(-1, 1) + torch.arange(32)) % 2 * 2.0 - 1
    video = board.expand(3, 2, 32, 32)
    assert ssim(-video, video).item() == pytest.approx(-1, abs=0.01)


def test_one_video_equals_its_row_in_a_batch():
    video, reference = noise(3, 3, 4, 16, 18), noise(3, 3, 4, 16, 18, seed=1)
    for measure in (psnr, ssim):
        together = measure(video, reference)
        assert together.shape == (3,)
        for row in range(3):
            assert measure(video[row], reference[row]).shape == ()
            torch.testing.assert_close(measure(video[row], reference[row]), together[row])


def test_ssim_is_the_mean_over_frames():
    video, reference = noise(3, 4, 16, 16), noise(3, 4, 16, 16, seed=1)
    each = torch.stack([ssim(video[:, t : t + 1], reference[:, t : t + 1]) for t in range(4)])
    torch.testing.assert_close(ssim(video, reference), each.mean())


def test_half_precision_is_measured_in_float32():
    video, reference = noise(3, 2, 16, 16).bfloat16(), noise(3, 2, 16, 16, seed=1).bfloat16()
    for measure in (psnr, ssim):
        assert measure(video, reference).dtype == torch.float32
        torch.testing.assert_close(measure(video, reference), measure(video.float(), reference.float()))


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    "video, reference, message",
    [
        (torch.zeros(3, 2, 16, 16), torch.zeros(3, 2, 16, 17), "reference must have the video's shape"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), "video must be"),
        (torch.zeros(3, 0, 16, 16), torch.zeros(3, 0, 16, 16), "video must be"),
        (torch.zeros(3, 2, 16, 16, dtype=torch.uint8), torch.zeros(3, 2, 16, 16), "video must be floating point"),
        (torch.full((3, 2, 16, 16), math.nan), torch.zeros(3, 2, 16, 16), "video has NaN"),
    ],
)
def test_refusals(measure, video, reference, message):
    with pytest.raises(ValueError, match=message):
        measure(video, reference)


def test_more_refusals():
    with pytest.raises(ValueError, match="at least 11 x 11, got 10 x 16"):
        ssim(torch.zeros(3, 2, 10, 16), torch.zeros(3, 2, 10, 16))
    with pytest.raises(ValueError, match="low must be below high"):
        psnr(torch.zeros(3, 2, 16, 16), torch.zeros(3, 2, 16, 16), low=1.0, high=0.0)
