# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vidgen.diffusion import euler_step, guide, rescale_guidance, sample, shifted_linear_schedule


def test_exact_velocity_lands_on_the_data():
    data, noise = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    # along the straight path the velocity is constant, so one step and many steps agree
    for num_steps in (1, 9):
        out = sample(lambda x, t: noise - data, noise, shifted_linear_schedule(num_steps, 7.0))
        torch.testing.assert_close(out, data, rtol=1e-5, atol=1e-5)


def test_model_sees_timesteps_and_every_step_is_reported():
    sigmas = shifted_linear_schedule(4, 3.0)
    timesteps, reported = [], []

    def model(x, timestep):
        timesteps.append(timestep)
        return torch.ones_like(x)

    out = sample(model, torch.zeros(2, 1, 1, 1, 1), sigmas, on_step=lambda i, x: reported.append((i, x.clone())))
    torch.testing.assert_close(torch.stack(timesteps), (1000 * sigmas[:-1])[:, None].expand(4, 2))
    assert [i for i, _ in reported] == [0, 1, 2, 3]
    assert torch.equal(reported[-1][1], out)
    torch.testing.assert_close(out, torch.full_like(out, -1.0))


def test_guidance_order_is_negative_then_positive():
    def model(x, timestep, text):
        assert x.shape[0] == 2 * 3 and torch.equal(x[:3], x[3:])
        return text.view(-1, 1, 1, 1, 1).expand_as(x)

    out = sample(
        model,
        torch.zeros(3, 1, 1, 1, 1),
        torch.tensor([1.0, 0.0]),
        {"text": torch.full((3,), 2.0)},
        negative_conditioning={"text": torch.full((3,), 1.0)},
        guidance_scale=5.0,
    )
    assert out.flatten().tolist() == [-6.0] * 3


def test_without_guidance_the_negative_is_not_used():
    seen = []

    def model(x, timestep, text):
        seen.append(text)
        return torch.zeros_like(x)

    text = torch.ones(1, 2)
    sample(model, torch.zeros(1, 1, 1, 1, 1), torch.tensor([1.0, 0.0]), {"text": text}, guidance_scale=1.0)
    assert len(seen) == 1 and torch.equal(seen[0], text)


def test_full_rescale_restores_the_spread():
    negative, positive = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    guided = guide(negative, positive, 8.0, 1.0)
    torch.testing.assert_close(guided.flatten(1).std(1), positive.flatten(1).std(1))
    plain = guide(negative, positive, 8.0)
    torch.testing.assert_close(guide(negative, positive, 8.0, 0.25), 0.25 * guided + 0.75 * plain)


def test_half_precision_steps_are_taken_in_float32():
    # 2049 has no float16 value: rounding the latents first would end at 2047
    out = euler_step(torch.tensor([2049.0]), torch.ones(1, dtype=torch.float16), 1.0, 0.0)
    assert out.dtype == torch.float16 and out.item() == 2048


def test_non_finite_velocity_names_the_step():
    def model(x, timestep):
        return x / 0 if timestep[0] < 600 else torch.zeros_like(x)

    with pytest.raises(FloatingPointError, match="step 1 of 2"):
        sample(model, torch.ones(1, 1), torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sigmas": torch.tensor([1.0])}, "sigmas"),
        ({"guidance_scale": 2.0}, "needs both"),
        ({"guidance_scale": 2.0, "conditioning": {"a": torch.ones(1)}}, "needs both"),
        (
            {
                "guidance_scale": 2.0,
                "conditioning": {"a": torch.ones(1)},
                "negative_conditioning": {"b": torch.ones(1)},
            },
            "same tensors",
        ),
        (
            {
                "guidance_scale": 2.0,
                "conditioning": {"a": torch.ones(2)},
                "negative_conditioning": {"a": torch.ones(2)},
            },
            "batch 1",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        sample(lambda x, t, **_: x, torch.ones(1, 2), **{"sigmas": torch.tensor([1.0, 0.0]), **arguments})


def test_wrong_shape_from_the_model():
    with pytest.raises(ValueError, match="model must return"):
        sample(lambda x, t: x[:, :1], torch.ones(1, 2), torch.tensor([1.0, 0.0]))


def test_rescale_out_of_range():
    with pytest.raises(ValueError, match="rescale"):
        rescale_guidance(torch.ones(1, 2), torch.ones(1, 2), 1.5)
