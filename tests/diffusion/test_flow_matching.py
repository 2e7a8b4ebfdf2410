# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from vidgen.diffusion import (
    add_noise,
    draw_sigmas,
    dynamic_shift,
    flow_matching_loss,
    loss_weights,
    masked_mean,
    mode_sigmas,
    shift_sigmas,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_is_the_formula():
    latents, noise = (
        torch.randn(2, 3, 2, 4, 6, generator=seeded(0)),
        torch.randn(2, 3, 2, 4, 6, generator=seeded(1)),
    )
    sigmas = torch.tensor([0.2, 0.7])
    seen = {}

    def model(x, timestep):
        seen.update(x=x, timestep=timestep)
        return 0.3 * x

    loss = flow_matching_loss(model, latents, noise=noise, sigmas=sigmas)
    shifted = shift_sigmas(sigmas, dynamic_shift(4 * 6 // 4))
    level = shifted.view(2, 1, 1, 1, 1)
    x = level * noise + (1 - level) * latents
    torch.testing.assert_close(seen["x"], x)
    torch.testing.assert_close(seen["timestep"], 1000 * shifted)
    torch.testing.assert_close(loss, ((0.3 * x - (noise - latents)) ** 2).mean())


def test_perfect_model_has_no_loss():
    latents, noise = torch.randn(1, 2, 1, 4, 4), torch.randn(1, 2, 1, 4, 4)
    loss = flow_matching_loss(lambda x, t: noise - latents, latents, noise=noise, shift=1.0)
    assert loss == 0


def test_masked_positions_do_not_count():
    latents, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    mask = torch.ones(2, 2, 4, 4)
    mask[1, :, 2:] = 0
    sigmas = torch.tensor([0.3, 0.6])
    corrupted = latents.clone()
    corrupted[1, :, :, 2:] = 1e3

    def loss(x0):
        return flow_matching_loss(lambda x, t: torch.zeros_like(x), x0, noise=noise, sigmas=sigmas, mask=mask)

    torch.testing.assert_close(loss(latents), loss(corrupted))
    errors = ((noise - latents) ** 2)[mask.bool().unsqueeze(1).expand_as(latents)]
    torch.testing.assert_close(loss(latents), errors.mean())


def test_same_seed_same_loss():
    latents = torch.randn(2, 3, 2, 4, 4)
    first, again, other = (flow_matching_loss(lambda x, t: x, latents, generator=seeded(s)).item() for s in (5, 5, 6))
    assert first == again != other


def test_bfloat16_latents_give_float32_loss():
    latents = torch.randn(1, 2, 1, 4, 4, dtype=torch.bfloat16)
    loss = flow_matching_loss(lambda x, t: x, latents)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_densities():
    n = 20000
    for density in ("logit_normal", "mode", "uniform"):
        sigmas = draw_sigmas(n, density, generator=seeded(0))
        assert sigmas.min() >= 0 and sigmas.max() <= 1
        assert sigmas.mean() == pytest.approx(0.5, abs=0.01)
    # quartiles of sigmoid(normal) are sigmoid(+-0.6745)
    quartile = draw_sigmas(n, "logit_normal", generator=seeded(0)).quantile(0.25)
    assert quartile == pytest.approx(1 / (1 + math.exp(0.6745)), abs=0.01)
    assert mode_sigmas(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_weights():
    sigmas = torch.tensor([0.25, 0.5])
    assert loss_weights(sigmas).tolist() == [1, 1]
    assert loss_weights(sigmas, "sigma_sqrt").tolist() == pytest.approx([16, 4])
    assert loss_weights(sigmas, "cosmap").tolist() == pytest.approx([2 / (math.pi * 0.625), 2 / (math.pi * 0.5)])
    latents, noise = torch.randn(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2)
    weighted = flow_matching_loss(
        lambda x, t: torch.zeros_like(x),
        latents,
        noise=noise,
        sigmas=sigmas,
        shift=1.0,
        weighting="sigma_sqrt",
    )
    error = ((noise - latents) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(weighted, (error * torch.tensor([16.0, 4.0])).mean())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: draw_sigmas(1, "gaussian"), "density"),
        (lambda: loss_weights(torch.ones(1), "sigma"), "weighting"),
        (lambda: masked_mean(torch.ones(1, 2, 3, 4, 5), torch.ones(1, 3, 4, 4)), "mask"),
        (lambda: masked_mean(torch.ones(1, 2, 3, 4, 5), torch.zeros(1, 3, 4, 5)), "no valid"),
        (lambda: flow_matching_loss(lambda x, t: x, torch.ones(1, 2, 3)), "latents"),
        (lambda: flow_matching_loss(lambda x, t: x[:, :1], torch.ones(1, 2, 1, 2, 2)), "model must return"),
        (
            lambda: flow_matching_loss(lambda x, t: x, torch.ones(1, 2, 1, 2, 2), noise=torch.ones(1, 2, 1, 2, 1)),
            "noise",
        ),
        (
            lambda: flow_matching_loss(lambda x, t: x, torch.ones(1, 2, 1, 2, 2), sigmas=torch.ones(2)),
            "sigmas",
        ),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_add_noise_at_the_ends():
    latents, noise = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2)
    mixed = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], latents[0]) and torch.equal(mixed[1], noise[1])
