# SPDX-License-Identifier: Apache-2.0
"""Samplers, loss and image conditions of CogVideoX, against the schedulers of diffusers over whole trajectories."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from vidgen import diffusion
from vidgen.diffusion import Step
from vidgen.diffusion.dpm import dpm_coefficients
from vidgen.diffusion.v_prediction import velocity_target

SHAPE = (2, 3, 2, 4, 5)  # batch, channels, frames, height, width


def scheduler(cls: Any, shift: float = 1.0, spacing: str = "trailing", **changes: Any) -> Any:
    return cls(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing=spacing,
        clip_sample=False,
        snr_shift_scale=shift,
        **changes,
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Depends on everything that it is given."""
    return torch.tanh(0.9 * x + text.view(-1, 1, 1, 1, 1) * (0.3 + timestep.view(-1, 1, 1, 1, 1) / 1000))


def run_diffusers(
    cls: Any, count: int, *, guidance: float = 1.0, dynamic: bool = False, seed: int = 7, **options: Any
) -> Tensor:
    """The loop of diffusers' pipeline; latents have the frames first there."""
    s = scheduler(cls, **options)
    s.set_timesteps(count)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((SHAPE[0], SHAPE[2], SHAPE[1], *SHAPE[3:]), generator=generator)
    text, old = torch.tensor([0.5, -1.0]), None
    timesteps = s.timesteps[:count]
    for i, t in enumerate(timesteps):
        v = network(x, t.expand(len(x)), text)
        if guidance > 1:
            negative = network(x, t.expand(len(x)), torch.zeros(2))
            scale = guidance
            if dynamic:
                scale = 1 + guidance * (1 - math.cos(math.pi * ((count - t.item()) / count) ** 5.0)) / 2
            v = negative + scale * (v - negative)
        if cls is CogVideoXDDIMScheduler:
            x = s.step(v, t, x, return_dict=False)[0]
        else:
            back = timesteps[i - 1] if i > 0 else None
            x, old = s.step(v, old, t, back, x, generator=generator, return_dict=False)
    return x.transpose(1, 2)


def run_ours(solver: str, steps: list[Step], *, guidance: float = 1.0, dynamic: bool = False, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return diffusion.sample_discrete(
        network,
        diffusion.draw_noise(SHAPE, generator=generator),
        steps,
        {"text": torch.tensor([0.5, -1.0])},
        negative_conditioning={"text": torch.zeros(2)},
        solver=solver,
        guidance_scale=guidance,
        dynamic_guidance=dynamic,
        generator=generator,
    )


# Tables and timesteps


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_tables_equal_diffusers(shift: float) -> None:
    ours, theirs = diffusion.cogvideox_alphas_cumprod(shift), scheduler(CogVideoXDDIMScheduler, shift).alphas_cumprod
    assert ours.dtype == torch.float64 and ours[-1] == 0
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_equal_diffusers_for_every_number(spacing: str) -> None:
    theirs, beyond = scheduler(CogVideoXDDIMScheduler, spacing=spacing), 0
    for count in range(1, 1001):
        theirs.set_timesteps(count)
        timesteps = theirs.timesteps.tolist()
        beyond += len(timesteps) > count
        assert diffusion.spaced_timesteps(count, spacing) == timesteps[:count]
        assert timesteps[count:] in ([], [-1])  # the defect of diffusers: one step too many
    assert beyond == (62 if spacing == "trailing" else 0)


def test_timesteps_with_offset() -> None:
    theirs = scheduler(CogVideoXDDIMScheduler, spacing="leading", steps_offset=3)
    theirs.set_timesteps(30)
    assert diffusion.spaced_timesteps(30, "leading", offset=3) == theirs.timesteps.tolist()


def test_timesteps_of_sat() -> None:
    for count in (1, 3, 6, 50, 51, 77, 999):
        wanted = np.linspace(999, 0, count, endpoint=False).astype(int).tolist()
        assert [step.timestep for step in diffusion.sat_steps(count)] == wanted
    assert [step.timestep for step in diffusion.sat_steps(1000)] == [*range(999, -1, -1)]


def test_levels_of_sat_are_near_those_of_diffusers() -> None:
    ours, theirs = diffusion.sat_steps(50), diffusion.diffusers_steps(50)
    assert [step.timestep for step in ours] == [step.timestep for step in theirs]
    largest = max(abs(a.level - b.level) for a, b in zip(ours, theirs, strict=True))
    assert 1e-3 < largest < 1.3e-3
    assert max(abs(step.seen_level - step.level) for step in ours) > 0
    assert ours[0].level == 0 and ours[-1].next_level == 1
    assert [step.draws for step in ours] == [1] + [2] * 48 + [0]


# Trajectories


@pytest.mark.parametrize("count", [1, 2, 7, 48, 61])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_equals_diffusers(count: int, shift: float) -> None:
    steps = diffusion.diffusers_steps(count, diffusion.cogvideox_alphas_cumprod(shift))
    theirs = run_diffusers(CogVideoXDDIMScheduler, count, shift=shift)
    torch.testing.assert_close(run_ours("ddim", steps), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 61])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_equals_diffusers_from_a_seed(count: int, shift: float) -> None:
    """Also the noise: one draw a step, a second one where the order is 2, and frames before channels."""
    steps = diffusion.diffusers_steps(count, diffusion.cogvideox_alphas_cumprod(shift))
    theirs = run_diffusers(CogVideoXDPMScheduler, count, shift=shift)
    torch.testing.assert_close(run_ours("dpm", steps), theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("solver, cls", [("ddim", CogVideoXDDIMScheduler), ("dpm", CogVideoXDPMScheduler)])
def test_other_spacings_equal_diffusers(solver: str, cls: Any, spacing: str) -> None:
    steps = diffusion.diffusers_steps(9, spacing=spacing)
    torch.testing.assert_close(run_ours(solver, steps), run_diffusers(cls, 9, spacing=spacing), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("solver, cls", [("ddim", CogVideoXDDIMScheduler), ("dpm", CogVideoXDPMScheduler)])
def test_guidance_equals_diffusers(solver: str, cls: Any, dynamic: bool) -> None:
    ours = run_ours(solver, diffusion.diffusers_steps(10), guidance=6.0, dynamic=dynamic)
    theirs = run_diffusers(cls, 10, guidance=6.0, dynamic=dynamic)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


def test_final_level_of_the_first_entry() -> None:
    theirs = scheduler(CogVideoXDDIMScheduler, set_alpha_to_one=False)
    theirs.set_timesteps(5)
    x, v = draw(*SHAPE), draw(*SHAPE, seed=1)
    table = diffusion.cogvideox_alphas_cumprod()
    step = diffusion.diffusers_steps(5, table, final_level=float(table[0]))[-1]
    ours, clean = diffusion.ddim_step(x, v, step)
    wanted = theirs.step(v, theirs.timesteps[-1], x)
    torch.testing.assert_close(ours, wanted.prev_sample)
    torch.testing.assert_close(clean, wanted.pred_original_sample)


def test_limits_at_zero_terminal_snr() -> None:
    steps = diffusion.diffusers_steps(5)
    first, second, last = (dpm_coefficients(steps[i]) for i in (0, 1, -1))
    root = math.sqrt(steps[0].next_level)
    assert first == (0.0, root, math.sqrt(1 - steps[0].next_level), 0.0)  # the start noise is thrown away
    assert second.lead == 0 and steps[1].second_order  # the step before began with no signal at all
    assert (last.keep, last.take, last.stir) == (0.0, 1.0, 0.0)
    x, v, noise = draw(*SHAPE), draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    after, clean = diffusion.dpm_step(x, v, steps[0], noise, None)
    assert torch.equal(clean, -v)
    torch.testing.assert_close(after, root * -v + math.sqrt(1 - root**2) * noise)
    for solver in ("ddim", "dpm"):
        end, clean = (
            diffusion.ddim_step(x, v, steps[-1])
            if solver == "ddim"
            else diffusion.dpm_step(x, v, steps[-1], None, clean)
        )
        torch.testing.assert_close(end, clean)


def test_the_right_velocity_leads_to_the_latent() -> None:
    """With the velocity of one latent at every level, both solvers and both tables arrive at it."""
    clean = draw(1, 3, 2, 4, 5)
    for steps in (diffusion.diffusers_steps(10), diffusion.sat_steps(10, 3.0)):
        levels = {step.timestep: step.seen_level for step in steps}

        def velocity(x: Tensor, timestep: Tensor, levels: dict[int, float] = levels) -> Tensor:
            level = levels[int(timestep[0])]
            noise = (x - math.sqrt(level) * clean) / math.sqrt(1 - level)
            return math.sqrt(level) * noise - math.sqrt(1 - level) * clean

        for solver in ("ddim", "dpm"):
            generator = torch.Generator().manual_seed(1)
            end = diffusion.sample_discrete(
                velocity, draw(1, 3, 2, 4, 5, seed=9), steps, solver=solver, generator=generator
            )
            torch.testing.assert_close(end, clean, atol=1e-4, rtol=1e-4)


def test_negative_comes_before_positive_and_steps_are_reported() -> None:
    seen: list[tuple[list[int], list[float]]] = []
    ends: list[int] = []

    def model(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        assert torch.equal(x[:2], x[2:])
        seen.append((timestep.tolist(), text.tolist()))
        return 0.1 * x

    diffusion.sample_discrete(
        model,
        draw(*SHAPE),
        diffusion.diffusers_steps(2),
        {"text": torch.tensor([1.0, 2.0])},
        negative_conditioning={"text": torch.tensor([-1.0, -2.0])},
        guidance_scale=2.0,
        on_step=lambda index, x: ends.append(index),
    )
    assert seen == [([999] * 4, [-1.0, -2.0, 1.0, 2.0]), ([499] * 4, [-1.0, -2.0, 1.0, 2.0])]
    assert ends == [0, 1]


def test_latents_stay_in_float32() -> None:
    end = diffusion.sample_discrete(
        lambda x, timestep: (0.1 * x).bfloat16(), draw(*SHAPE).bfloat16(), diffusion.diffusers_steps(3)
    )
    assert end.dtype == torch.float32


def test_noise_is_drawn_frames_first() -> None:
    ours = diffusion.draw_noise(SHAPE, generator=torch.Generator().manual_seed(5))
    theirs = torch.randn((2, 2, 3, 4, 5), generator=torch.Generator().manual_seed(5))
    assert tuple(ours.shape) == SHAPE and torch.equal(ours.transpose(1, 2), theirs)


def test_dynamic_guidance_keeps_its_bounds() -> None:
    values = [diffusion.dynamic_guidance_scale(6.0, t, 50) for t in diffusion.spaced_timesteps(50)]
    assert 1 <= min(values) < 1.2 and 6.8 < max(values) <= 7
    assert diffusion.dynamic_guidance_scale(6.0, 50, 50) == 1
    assert diffusion.dynamic_guidance_scale(6.0, 0, 50) == 7


# Refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: diffusion.spaced_timesteps(0), r"num_steps must lie in 1\.\.1000, got 0"),
        (lambda: diffusion.spaced_timesteps(1001), r"num_steps must lie in 1\.\.1000, got 1001"),
        (lambda: diffusion.spaced_timesteps(5, "even"), "spacing must be one of"),
        (lambda: diffusion.diffusers_steps(5, spacing="leading", offset=300), "offset=300 leads beyond"),
        (lambda: diffusion.sat_steps(0), r"num_steps must lie in 1\.\.1000, got 0"),
        (lambda: diffusion.cogvideox_alphas_cumprod(0.0), "shift must be positive"),
        (lambda: diffusion.dynamic_guidance_scale(6.0, 3, 0), "num_steps must be at least 1"),
        (lambda: diffusion.draw_noise((1, 2, 3)), r"shape must be \(batch, channels, frames, height, width\)"),
        (lambda: diffusion.ddim_step(draw(2, 3), draw(2, 4), diffusion.diffusers_steps(3)[0]), "velocity must be"),
        (lambda: step_without("noise"), "noise is needed at timestep 666, got None"),
        (lambda: step_without("last_clean"), "last_clean is needed at timestep 666, got None"),
        (lambda: sample(steps=[]), "steps must have at least one step"),
        (lambda: sample(solver="euler"), "solver must be 'ddim' or 'dpm', got 'euler'"),
        (
            lambda: sample(model=lambda x, timestep: x[:, :1]),
            r"model must return \(2, 3, 2, 4, 5\), got \(2, 1, 2, 4, 5\)",
        ),
        (lambda: sample(guidance_scale=2.0), "needs both conditioning and negative_conditioning"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def step_without(name: str) -> None:
    given: dict[str, Any] = {"noise": draw(2, 3), "last_clean": draw(2, 3)}
    diffusion.dpm_step(draw(2, 3), draw(2, 3), diffusion.diffusers_steps(3)[1], **{**given, name: None})


def sample(**changes: Any) -> Tensor:
    given: dict[str, Any] = {"model": lambda x, timestep: 0.1 * x, "steps": diffusion.diffusers_steps(2)}
    given |= {"latents": draw(*SHAPE)} | changes
    return diffusion.sample_discrete(**given)


def test_a_velocity_that_is_not_finite_stops_the_sampler() -> None:
    with pytest.raises(FloatingPointError, match="not finite at step 1 of 2, timestep 499"):
        sample(model=lambda x, timestep: x / (timestep.view(-1, 1, 1, 1, 1) - 499))


# Loss


def loss_parts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    latents, noise = draw(3, 2, 2, 3, 4, seed=seed), draw(3, 2, 2, 3, 4, seed=seed + 1)
    table, timesteps = diffusion.cogvideox_alphas_cumprod(), torch.tensor([0, 500, 999])
    return latents, noise, table, timesteps, lambda x, t: torch.sin(2 * x) + t.view(-1, 1, 1, 1, 1) / 1000


def test_the_loss_is_the_squared_error_of_the_velocity() -> None:
    latents, noise, table, timesteps, model = loss_parts()
    losses = diffusion.cogvideox_losses(model, latents, alphas_cumprod=table, timesteps=timesteps, noise=noise)
    level = table[timesteps].view(-1, 1, 1, 1, 1)
    noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).float()
    wanted = (model(noisy, timesteps) - velocity_target(latents, noise, table, timesteps)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-5)
    loss = diffusion.cogvideox_loss(model, latents, alphas_cumprod=table, timesteps=timesteps, noise=noise)
    torch.testing.assert_close(loss, losses.mean())


def test_weights_are_bounded_for_every_sample() -> None:
    latents, noise, table, timesteps, model = loss_parts()
    arguments: dict[str, Any] = {"alphas_cumprod": table, "timesteps": timesteps, "noise": noise}
    plain = diffusion.cogvideox_losses(model, latents, **arguments)
    bounded = diffusion.cogvideox_losses(model, latents, min_snr_value=2.0, **arguments)
    weight = 1 / (1 - table[timesteps])
    assert weight[0] > 2 and weight[2] < 2
    torch.testing.assert_close(bounded, (plain.double() * weight.clamp(max=2) / weight).float(), rtol=1e-4, atol=1e-6)


def test_absolute_error() -> None:
    latents, noise, table, timesteps, model = loss_parts()
    losses = diffusion.cogvideox_losses(
        model, latents, alphas_cumprod=table, timesteps=timesteps, noise=noise, kind="l1"
    )
    level = table[timesteps].view(-1, 1, 1, 1, 1)
    noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).float()
    clean = level.sqrt() * noisy - (1 - level).sqrt() * model(noisy, timesteps)
    wanted = ((clean - latents).abs() / (1 - level)).flatten(1).mean(1)
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-3, atol=1e-5)


def test_draws_come_from_the_generator() -> None:
    latents, _, table, _, model = loss_parts()
    losses = [
        diffusion.cogvideox_loss(model, latents, alphas_cumprod=table, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_offset_noise_moves_each_sample_as_a_whole() -> None:
    latents = torch.zeros(4, 3, 2, 4, 5)
    plain, moved = (
        diffusion.draw_training_noise(latents, offset_noise_level=level, generator=torch.Generator().manual_seed(1))
        for level in (0.0, 0.5)
    )
    shift = (moved - plain).flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-6, rtol=0)
    assert shift[:, 0].abs().min() > 0 and len(set(shift[:, 0].tolist())) == 4


def test_groups_share_the_timesteps_out() -> None:
    for group in (0, 3, 39):
        drawn = diffusion.draw_grouped_timesteps(500, group=group, num_groups=40)
        assert drawn.min() == group * 25 and drawn.max() == group * 25 + 24
    assert diffusion.draw_grouped_timesteps(3000).unique().numel() > 900
    with pytest.raises(ValueError, match=r"group must lie in 0\.\.39 .* got 40 of 40"):
        diffusion.draw_grouped_timesteps(1, group=40, num_groups=40)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "huber"}, "kind must be 'l2' or 'l1', got 'huber'"),
        ({"min_snr_value": 0.0}, "min_snr_value must be positive"),
        ({"noise": draw(3, 2, 2, 3, 5)}, r"noise must be \(3, 2, 2, 3, 4\), got \(3, 2, 2, 3, 5\)"),
        ({"timesteps": torch.tensor([1])}, r"timesteps must be \(3,\), got \(1,\)"),
        ({"model": lambda x, t: x[:1]}, r"model must return \(3, 2, 2, 3, 4\)"),
        ({"latents": draw(3, 2)}, r"latents must be \(batch, channels, frames, height, width\)"),
    ],
)
def test_bad_arguments_of_the_loss(changes: dict[str, Any], message: str) -> None:
    latents, noise, table, timesteps, model = loss_parts()
    given = {"model": model, "latents": latents, "alphas_cumprod": table, "timesteps": timesteps, "noise": noise}
    with pytest.raises(ValueError, match=message):
        diffusion.cogvideox_losses(**{**given, **changes})


# Image to video


@pytest.mark.parametrize(
    "frames, patch, wanted",
    [(49, None, (13, 0)), (81, 2, (22, 1)), (161, 2, (42, 1)), (85, 2, (22, 0)), (9, 2, (4, 1)), (1, None, (1, 0))],
)
def test_latent_frames(frames: int, patch: int | None, wanted: tuple[int, int]) -> None:
    assert diffusion.latent_frames(frames, patch_size_t=patch) == wanted


def test_the_image_stands_in_front_of_zeros() -> None:
    image = draw(2, 3, 1, 4, 5)
    latents = diffusion.image_latents(image, 4, patch_size_t=2)
    assert torch.equal(latents[:, :, :1], image) and not latents[:, :, 1:].any() and latents.shape[2] == 4
    odd = diffusion.image_latents(image, 3, patch_size_t=2)
    assert odd.shape[2] == 4 and torch.equal(odd[:, :, 0], odd[:, :, 1]) and not odd[:, :, 2:].any()
    assert diffusion.image_latents(image, 3).shape[2] == 3
    with pytest.raises(ValueError, match=r"image must be \(batch, channels, 1, height, width\)"):
        diffusion.image_latents(draw(2, 3, 2, 4, 5), 3)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        diffusion.latent_frames(0)


def test_training_latents_are_padded_in_front() -> None:
    latents = draw(1, 2, 3, 4, 5)
    padded = diffusion.pad_training_latents(latents, 2)
    assert torch.equal(padded[:, :, 1:], latents) and torch.equal(padded[:, :, 0], latents[:, :, 0])
    assert diffusion.pad_training_latents(padded, 2) is padded
    assert diffusion.pad_training_latents(latents, None) is latents


def test_noise_on_images_has_the_stated_spread() -> None:
    image = torch.zeros(400, 3, 1, 8, 8)
    noised = diffusion.noise_image(image, generator=torch.Generator().manual_seed(0))
    logs = noised.flatten(1).std(1).log()
    assert abs(float(logs.mean()) + 3) < 0.1 and abs(float(logs.std()) - 0.5) < 0.06
