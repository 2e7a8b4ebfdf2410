# SPDX-License-Identifier: Apache-2.0
"""Tables, weights and loss of v-prediction."""

import pytest
import torch

from vidgen.diffusion import (
    draw_timesteps,
    min_snr_weights,
    offset_noise,
    open_sora_plan_alphas_cumprod,
    v_prediction_loss,
)
from vidgen.diffusion.v_prediction import clean_from_velocity, diffuse, signal_to_noise, velocity_target

TABLE = open_sora_plan_alphas_cumprod()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_table_is_that_of_diffusers(schedule: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[schedule]
    scheduler = diffusers.DDPMScheduler(
        beta_start=ends[0], beta_end=ends[1], beta_schedule=schedule, rescale_betas_zero_snr=True
    )
    table = open_sora_plan_alphas_cumprod(schedule)
    torch.testing.assert_close(table, scheduler.alphas_cumprod, rtol=2e-5, atol=0)
    assert table[-1] == 0 and table.shape == (1000,) and (table.diff() < 0).all()


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule must be one of .*'linear', 'scaled_linear'"):
        open_sora_plan_alphas_cumprod("cosine")


def test_velocity_and_latent_turn_into_each_other() -> None:
    clean, noise, timesteps = torch.randn(3, 2, 2, 4, 4), torch.randn(3, 2, 2, 4, 4), torch.tensor([0, 500, 999])
    noisy = diffuse(clean, noise, TABLE, timesteps)
    velocity = velocity_target(clean, noise, TABLE, timesteps)
    torch.testing.assert_close(clean_from_velocity(noisy, velocity, TABLE, timesteps), clean, rtol=1e-4, atol=1e-5)
    assert torch.equal(noisy[2], noise[2]) and torch.equal(velocity[2], -clean[2])  # nothing but noise is left


def test_weights_by_hand() -> None:
    timesteps = torch.tensor([7, 400, 999])
    snr = signal_to_noise(TABLE, timesteps)
    assert snr[0] > 5 > snr[1] > 0 == snr[2]
    expected = torch.stack([5 / (snr[0] + 1), snr[1] / (snr[1] + 1), snr[2]])
    torch.testing.assert_close(min_snr_weights(TABLE, timesteps, 5.0), expected)
    with pytest.raises(ValueError, match="gamma"):
        min_snr_weights(TABLE, timesteps, 0.0)


def test_ranks_share_the_timesteps() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in range(4):
        drawn = draw_timesteps(4000, rank=rank, num_ranks=4, generator=generator)
        # a border is reached from both sides, half as often
        assert drawn.dtype == torch.int64 and {*drawn.tolist()} <= {*range(max(0, 250 * rank - 1), 250 * rank + 250)}
        assert len(set(drawn.tolist())) > 240
    everything = draw_timesteps(100_000, generator=generator)
    assert everything.min() == 0 and everything.max() == 999
    counts = torch.bincount(everything, minlength=1000)
    assert counts.min() > 50 and counts.max() < 160  # the ends are as likely as the others
    with pytest.raises(ValueError, match="rank must lie in 0..1, got 2"):
        draw_timesteps(1, rank=2, num_ranks=2)


def test_offset_noise_moves_whole_channels() -> None:
    noise, draws = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3)
    moved = offset_noise(noise, 0.5, draws) - noise
    torch.testing.assert_close(moved, (0.5 * draws).view(2, 3, 1, 1, 1).expand_as(noise))
    torch.testing.assert_close(offset_noise(noise, 0.5, draws.view(2, 3, 1, 1, 1)) - noise, moved)
    assert torch.equal(offset_noise(noise, 0.0), noise)
    with pytest.raises(ValueError, match="draws must be"):
        offset_noise(noise, 0.5, draws.T)


def loss_of(error: torch.Tensor, timesteps: torch.Tensor, **options) -> torch.Tensor:
    """The loss of a model that is wrong by ``error``."""
    clean, noise = torch.zeros_like(error), torch.randn_like(error)

    def model(noisy: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        assert torch.equal(given, timesteps)
        return velocity_target(clean, noise, TABLE, timesteps) + error

    return v_prediction_loss(model, clean, alphas_cumprod=TABLE, noise=noise, timesteps=timesteps, **options)


def test_loss_by_hand() -> None:
    error, timesteps = torch.randn(2, 3, 2, 4, 4), torch.tensor([100, 700])
    torch.testing.assert_close(loss_of(error, timesteps), error.square().mean())
    weights = min_snr_weights(TABLE, timesteps, 5.0).view(2, 1, 1, 1, 1)
    weighted = loss_of(error, timesteps, snr_gamma=5.0)
    torch.testing.assert_close(weighted, (weights * error.square()).mean())
    mask = (torch.rand(2, 2, 4, 4) < 0.5).float()
    masked = loss_of(error, timesteps, snr_gamma=5.0, mask=mask)
    kept = mask[:, None].expand_as(error)
    torch.testing.assert_close(masked, (weights * error.square() * kept).sum() / kept.sum())
    assert loss_of(error, torch.tensor([999, 999]), snr_gamma=5.0) == 0  # no signal, no lesson


def test_draws_come_from_the_generator() -> None:
    latents = torch.zeros(64, 2, 1, 4, 4)

    def seen(seed: int, **options) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            found.extend((x, t))
            return torch.zeros_like(x)

        generator = torch.Generator().manual_seed(seed)
        v_prediction_loss(model, latents, alphas_cumprod=TABLE, generator=generator, **options)
        return found

    first, second, other = seen(0), seen(0), seen(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    offset = seen(0, noise_offset=3.0)[0].mean((2, 3, 4)).std()
    assert offset > 2 > first[0].mean((2, 3, 4)).std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": torch.zeros(1, 3, 2, 4, 4)}, "noise must be"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64)}, "timesteps must be"),
        ({"mask": torch.ones(2, 2, 4)}, "mask must be"),
        ({"model": lambda x, t: x[:, :1]}, "model must return"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, "latents must be"),
    ],
)
def test_bad_inputs(change: dict, message: str) -> None:
    arguments = {"model": lambda x, t: x, "latents": torch.zeros(2, 3, 2, 4, 4), "alphas_cumprod": TABLE, **change}
    with pytest.raises(ValueError, match=message):
        v_prediction_loss(**arguments)
