# SPDX-License-Identifier: Apache-2.0
"""The wavelets against the convolutions that the original systems run, and what the battery does not ask."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vidgen import ops


def taps(signs):
    """The 2 x 2 (x 2) kernel whose entry at (.., dy, dx) flips where its dimension's sign does."""
    grid = torch.ones((2,) * len(signs), dtype=torch.float64)
    for dim, flips in enumerate(signs):
        if flips:
            grid.select(dim, 1).neg_()
    return grid[None, None]


def bands_3d():
    return [taps(signs) for signs in itertools.product((0, 1), repeat=3)]


@pytest.mark.parametrize("repeat", [True, False])
def test_haar_3d_is_eight_strided_convolutions(repeat):
    x = torch.randn(2, 3, 5 if repeat else 4, 4, 6, dtype=torch.float64)
    padded = torch.cat((x[:, :, :1], x), 2) if repeat else x
    depthwise = [F.conv3d(padded, 0.3536 * w.expand(3, 1, 2, 2, 2), stride=2, groups=3) for w in bands_3d()]
    torch.testing.assert_close(ops.haar_3d(x, repeat_first_frame=repeat), torch.cat(depthwise, 1))


@pytest.mark.parametrize("drop", [True, False])
def test_inverse_haar_3d_is_eight_transposed_convolutions(drop):
    y = torch.randn(2, 24, 3, 2, 5, dtype=torch.float64)
    parts = zip(y.chunk(8, 1), bands_3d(), strict=True)
    video = sum(F.conv_transpose3d(c, 0.3536 * w.expand(3, 1, 2, 2, 2), stride=2, groups=3) for c, w in parts)
    torch.testing.assert_close(ops.inverse_haar_3d(y, drop_first_frame=drop), video[:, :, int(drop) :])


def test_haar_2d_puts_height_differences_second():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    signs = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (height, width)
    expected = torch.cat([F.conv2d(x, 0.5 * taps(s).expand(3, 1, 2, 2), stride=2, groups=3) for s in signs], 1)
    torch.testing.assert_close(ops.haar_2d(x), expected)
    torch.testing.assert_close(ops.inverse_haar_2d(ops.haar_2d(x)), x)


def test_a_video_in_chunks_equals_the_whole():
    x = torch.randn(1, 3, 9, 4, 8)
    whole = ops.haar_3d(x)
    chunks = [ops.haar_3d(x[:, :, :1])] + [ops.haar_3d(c, repeat_first_frame=False) for c in x[:, :, 1:].split(4, 2)]
    assert torch.equal(torch.cat(chunks, 2), whole)
    back = [ops.inverse_haar_3d(chunks[0])] + [ops.inverse_haar_3d(c, drop_first_frame=False) for c in chunks[1:]]
    assert torch.equal(torch.cat(back, 2), ops.inverse_haar_3d(whole))


def test_exact_constant_inverts_and_rounded_constant_has_its_gain():
    x = torch.randn(1, 2, 5, 4, 4, dtype=torch.float64)
    exact = ops.inverse_haar_3d(ops.haar_3d(x, filter_constant=8**-0.5), filter_constant=8**-0.5)
    torch.testing.assert_close(exact, x)
    torch.testing.assert_close(ops.inverse_haar_3d(ops.haar_3d(x)), 8 * 0.3536**2 * x)


def test_an_image_has_no_differences_along_time():
    y = ops.haar_3d(torch.randn(1, 3, 1, 8, 8))
    assert y[:, 12:].abs().max() == 0 and y[:, :12].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_values_stay_in_their_windows(dtype):
    x = torch.ones(1, 1, 1, 2, 140, dtype=dtype)
    x[..., 0, 7], x[..., 1, 20], x[..., 1, 139] = float("nan"), float("inf"), float("-inf")
    bad = ~ops.haar_3d(x).isfinite()
    assert torch.equal(bad, ~ops.OPS["haar_3d"].reference(x, 0.3536, True).isfinite())
    assert bad.any((0, 1, 2, 3)).nonzero().flatten().tolist() == [3, 10, 69]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_and_ties_are_to_even(dtype):
    """Sums of integers are exact in float32, so that only the last rounding counts, and half of them are ties."""
    torch.manual_seed(0)
    bound = 200 if dtype == torch.bfloat16 else 2000
    x = torch.randint(-bound, bound, (1, 2, 3, 4, 280)).to(dtype)
    y = torch.randint(-bound, bound, (1, 16, 3, 4, 140)).to(dtype)
    for op, args in (
        ("haar_3d", (x, 1.0, True)),
        ("haar_2d", (x, 0.5)),
        ("inverse_haar_3d", (y, 1.0, False)),
        ("inverse_haar_2d", (y, 0.5)),
    ):
        assert torch.equal(ops.OPS[op](*args), ops.OPS[op].reference(*args))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.haar_3d(torch.ones(1, 1, 2, 2, 2)),
            r"haar_3d: frames of x must be odd \(repeat_first_frame=True\)",
        ),
        (lambda: ops.haar_3d(torch.ones(1, 1, 1, 2, 2), repeat_first_frame=False), "frames of x must be even"),
        (lambda: ops.haar_3d(torch.ones(1, 1, 1, 3, 2)), "haar_3d: height and width of x must be even"),
        (lambda: ops.haar_3d(torch.ones(1, 2, 2)), "haar_3d: x must be floating point"),
        (lambda: ops.inverse_haar_3d(torch.ones(1, 12, 1, 2, 2)), "channels of y must be a multiple of 8"),
        (lambda: ops.inverse_haar_3d(torch.ones(1, 8, 0, 2, 2)), "y must have a frame to drop"),
        (lambda: ops.haar_2d(torch.ones(1, 1, 2, 5)), "haar_2d: height and width of x must be even"),
        (lambda: ops.inverse_haar_2d(torch.ones(1, 6, 2, 2)), "channels of y must be a multiple of 4"),
        (lambda: ops.inverse_haar_2d(torch.ones(4, 2, 2)), "inverse_haar_2d: y must be floating point"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_results_that_go_past_the_caches(native):
    x = torch.randn(1, 1, 17, 512, 512)
    native.guard_outputs(True)
    try:
        whole = ops.haar_3d(x).clone()
        assert native.count_damaged_guards() == 0
    finally:
        native.guard_outputs(False)
    assert torch.equal(whole, torch.cat([ops.haar_3d(half) for half in x.chunk(2, 3)], 3))
