# SPDX-License-Identifier: Apache-2.0
"""Ancestral Euler steps against diffusers' EulerAncestralDiscreteScheduler, and what they refuse."""

import pytest
import torch
from torch import Tensor

from vidgen.diffusion import euler_ancestral_schedule, euler_ancestral_step, sample_euler_ancestral
from vidgen.diffusion.euler_ancestral import scale_input
from vidgen.diffusion.v_prediction import linear_alphas_cumprod

SHAPE = (1, 4, 2, 4, 4)


def new_scheduler(spacing: str, zero_snr: bool = True):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.EulerAncestralDiscreteScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing
    )


def velocity_of(x: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(x) * 0.7 + torch.sin(timestep / 300) * 0.3


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 30, 100])
def test_schedule_is_that_of_diffusers(spacing: str, num_steps: int) -> None:
    scheduler = new_scheduler(spacing)
    scheduler.set_timesteps(num_steps)
    ours = euler_ancestral_schedule(num_steps, spacing=spacing)
    torch.testing.assert_close(ours.timesteps, scheduler.timesteps, rtol=1e-6, atol=0)
    # at the smallest sigmas a bit of the table is 6e-5, and machines differ in it
    torch.testing.assert_close(ours.sigmas, scheduler.sigmas, rtol=2e-4, atol=0)
    assert ours.initial_std == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)
    # sqrt(2^24 - 1), which float32 rounds to 4096 or to its neighbour, by the machine
    assert spacing == "leading" or num_steps == 1 or ours.sigmas[0] == pytest.approx(4096, rel=1e-7)


def test_another_table() -> None:
    scheduler = new_scheduler("linspace", zero_snr=False)
    scheduler.set_timesteps(10)
    ours = euler_ancestral_schedule(10, linear_alphas_cumprod(dtype=torch.float32), spacing="linspace")
    torch.testing.assert_close(ours.sigmas, scheduler.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_steps", [5, 100])
def test_whole_trajectory_is_that_of_diffusers(monkeypatch, num_steps: int) -> None:
    """With the same noises; float64, in which the first step from 4096 loses nothing."""
    generator = torch.Generator().manual_seed(0)
    noise, *noises = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(num_steps + 1))
    scheduler = new_scheduler("trailing")
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    left = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **options: next(left))
    scheduler.set_timesteps(num_steps)
    theirs, x = [], noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity_of(scheduler.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
        theirs.append(x)
    ours: list[Tensor] = []
    result = sample_euler_ancestral(
        lambda x, timestep: velocity_of(x, timestep[0]),
        noise,
        euler_ancestral_schedule(num_steps),
        guidance_scale=1.0,
        step_noises=noises,
        on_step=lambda index, x: ours.append(x),
    )
    assert len(ours) == num_steps and torch.equal(result, ours[-1])
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):  # theirs are float32 inside
        torch.testing.assert_close(a, b.double(), rtol=1e-4, atol=5e-3 if index == 0 else 1e-3)


def test_a_step_by_hand() -> None:
    x, v, noise = torch.randn(3, *SHAPE, dtype=torch.float64)
    sigma, following = 3.0, 1.5
    clean = x / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * v
    up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
    down = (following**2 - up**2) ** 0.5
    expected = clean + (x - clean) * down / sigma + up * noise
    torch.testing.assert_close(euler_ancestral_step(x, v, sigma, following, noise), expected)
    torch.testing.assert_close(euler_ancestral_step(x, v, sigma, 0.0, noise), clean)  # the last one: no noise
    torch.testing.assert_close(scale_input(x, sigma), x / 10**0.5)


def test_a_perfect_model_gives_its_latent() -> None:
    """Whatever the noise: knowing the latent, every step moves exactly towards it."""
    latent = torch.randn(SHAPE, dtype=torch.float64)
    schedule = euler_ancestral_schedule(8)
    table = {float(t): s for t, s in zip(schedule.timesteps, schedule.sigmas.double(), strict=False)}

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        sigma = table[float(timestep[0])]
        signal, spread = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
        noise = (x - signal * latent) / spread
        return signal * noise - spread * latent

    noise = torch.randn(SHAPE, dtype=torch.float64)
    result = sample_euler_ancestral(model, noise, schedule, guidance_scale=1.0)
    torch.testing.assert_close(result, latent, rtol=1e-5, atol=1e-5)


def test_guidance_and_what_is_given() -> None:
    noise, given, calls = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 3, 2, 4, 4), []

    def model(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        calls.append((x, timestep, text))
        return x[:, :4] * 0 + text.view(-1, 1, 1, 1, 1)

    schedule = euler_ancestral_schedule(3)
    steps = [torch.zeros_like(noise)] * 3
    result = sample_euler_ancestral(
        model,
        noise,
        schedule,
        {"text": torch.tensor([2.0, 3.0])},
        negative_conditioning={"text": torch.tensor([1.0, 1.0])},
        given=given,
        guidance_scale=7.5,
        step_noises=steps,
    )
    for x, timestep, text in calls:
        assert x.shape == (4, 7, 2, 4, 4) and timestep.shape == (4,) and timestep.dtype == torch.float32
        assert torch.equal(x[:2], x[2:]) and torch.equal(x[:2, 4:], given)
        assert text.tolist() == [1, 1, 2, 3]
    torch.testing.assert_close(calls[0][0][:2, :4], noise, rtol=1e-6, atol=1e-6)  # std 4096, scaled back
    plain = sample_euler_ancestral(
        lambda x, t, text: x * 0 + text.view(-1, 1, 1, 1, 1),
        noise,
        schedule,
        {"text": 1 + 7.5 * torch.tensor([1.0, 2.0])},
        guidance_scale=1.0,
        step_noises=steps,
    )
    torch.testing.assert_close(result, plain)


def test_generator_decides() -> None:
    def run(seed: int) -> Tensor:
        return sample_euler_ancestral(
            lambda x, t: velocity_of(x, t[0]),
            torch.ones(SHAPE),
            euler_ancestral_schedule(4),
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_dtype_of_the_model_is_kept() -> None:
    seen = []

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append((x.dtype, timestep.tolist()))
        return x

    noise = torch.randn(SHAPE).bfloat16()
    result = sample_euler_ancestral(model, noise, euler_ancestral_schedule(2), guidance_scale=1.0)
    assert result.dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, [999.0]), (torch.bfloat16, [499.0])]  # not rounded to 1000 and 500


SCHEDULE = euler_ancestral_schedule(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: euler_ancestral_schedule(0), "num_steps must lie in 1..1000"),
        (lambda: euler_ancestral_schedule(5, spacing="karras"), "spacing must be one of"),
        (lambda: euler_ancestral_step(*torch.zeros(2, 3), 2.0, 1.0, torch.zeros(2)), "noise must be"),
        (lambda: sample_euler_ancestral(velocity_of, torch.zeros(SHAPE), SCHEDULE), "needs both conditioning"),
        (
            lambda: sample_euler_ancestral(velocity_of, torch.zeros(SHAPE), SCHEDULE, step_noises=[torch.zeros(SHAPE)]),
            "step_noises must be 2",
        ),
        (
            lambda: sample_euler_ancestral(
                velocity_of, torch.zeros(SHAPE), SCHEDULE, given=torch.zeros(1, 3, 1, 4, 4), guidance_scale=1.0
            ),
            "given must be",
        ),
        (
            lambda: sample_euler_ancestral(lambda x, t: x[:, :2], torch.zeros(SHAPE), SCHEDULE, guidance_scale=1.0),
            "model must return",
        ),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_not_finite_is_noticed() -> None:
    with pytest.raises(FloatingPointError, match="step 0 of 2, sigma 4096"):
        sample_euler_ancestral(lambda x, t: x * torch.inf, torch.ones(SHAPE), SCHEDULE, guidance_scale=1.0)
