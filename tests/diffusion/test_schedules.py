# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from vidgen.diffusion import dynamic_shift, linear_quadratic_schedule, shift_sigmas, shifted_linear_schedule


def test_dynamic_shift_of_the_released_size():
    # 576x1024 pixels: latent 72x128, 2304 tokens a frame
    assert dynamic_shift(72 * 128 // 4) == pytest.approx(math.exp(0.8466666666666667), rel=1e-12)
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(4096) == pytest.approx(math.exp(1.15))


def test_shift_formula_and_fixed_points():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        shift_sigmas(sigmas, 3.0),
        torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_shift_gamma():
    sigmas = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 3 / (3 + 9), 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(sigmas, 3.0, gamma=2.0), expected)


def test_shift_floor():
    assert shift_sigmas(torch.tensor([0.0, 0.5]), 1.0, sigma_eps=1e-3).tolist() == pytest.approx([1e-3, 0.5])


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_shifted_linear_runs_from_noise_to_data(num_steps):
    sigmas = shifted_linear_schedule(num_steps, 7.0)
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("num_steps", [2, 10, 50, 120])
def test_linear_quadratic_meets_its_definition(num_steps):
    sigmas = linear_quadratic_schedule(num_steps).double()
    fine = min(max(10 * num_steps, 250), 1000)
    half = num_steps // 2
    first = 1 - torch.arange(half, dtype=torch.float64) / fine
    torch.testing.assert_close(sigmas[:half], first, rtol=0, atol=1e-7)
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    if half > 2:
        # the second half is a parabola: third differences vanish
        assert sigmas[half:-1].diff(n=3).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: dynamic_shift(0), "num_tokens"),
        (lambda: shift_sigmas(torch.ones(1), 0.0), "shift"),
        (lambda: shift_sigmas(torch.ones(1), float("nan")), "shift"),
        (lambda: shift_sigmas(torch.ones(1), 1.0, sigma_eps=0.1), "sigma_eps"),
        (lambda: shifted_linear_schedule(0), "num_steps"),
        (lambda: linear_quadratic_schedule(5), "num_steps"),
        (lambda: linear_quadratic_schedule(10, approximate_steps=8), "approximate_steps"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
