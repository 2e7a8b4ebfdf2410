# SPDX-License-Identifier: Apache-2.0
"""Sampling, conditions and loss of Open-Sora 2.0 beyond their golden cases (tests/goldens)."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.diffusion import opensora_v2 as sampling
from vidgen.diffusion.opensora_v2_conditions import (
    CONDITION_TYPES,
    choose_condition,
    final_frames,
    given_frames,
    inference_condition,
    reference_clips,
    restore_references,
    training_condition,
)
from vidgen.diffusion.opensora_v2_loss import (
    batch_loss,
    drop_text,
    mix_with_noise,
    training_inputs,
    training_levels,
    velocity_target,
)
from vidgen.models.opensora_v2 import MMDiT, preset
from vidgen.nn import pack_patches


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    return {"txt": draw(batch, 3, 20, seed=seed), "y_vec": draw(batch, 12, seed=seed + 1)}


# Schedule


def test_published_shifts() -> None:
    assert sampling.resolution_shift(252, 33) == pytest.approx(5.733, abs=5e-4)
    assert sampling.resolution_shift(2304, 33) == pytest.approx(11.872, abs=5e-4)
    assert sampling.resolution_shift(144, 1) == pytest.approx(0.9417, abs=5e-5)


def test_schedule() -> None:
    for options in ({}, {"flow_shift": 5.0}, {"shift": False}, {"base_shift": 0.5, "max_shift": 1.15}):
        levels = sampling.schedule(20, 252, 33, **options)
        assert len(levels) == 21 and levels[0] == 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    u = torch.linspace(1, 0, 21)
    torch.testing.assert_close(sampling.schedule(20, 252, 33, flow_shift=5.0), 5 * u / (1 + 4 * u))
    assert torch.equal(sampling.schedule(20, 252, 33, shift=False), u)
    with pytest.raises(ValueError, match="num_steps"):
        sampling.schedule(0, 252, 33)
    with pytest.raises(ValueError, match="shift"):
        sampling.schedule(5, 252, 33, flow_shift=0.0)


def test_latent_frames() -> None:
    assert [sampling.latent_frames(n) for n in (1, 4, 5, 33, 129)] == [1, 1, 2, 9, 33]
    assert [sampling.latent_frames(n, causal=False) for n in (1, 4, 33, 128)] == [1, 1, 8, 32]
    with pytest.raises(ValueError, match="num_frames"):
        sampling.latent_frames(0)


def test_noise_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    noise = sampling.initial_noise(1, 4, 3, 33, 50, seed=7)
    assert noise.shape == (1, 4, 3, 6, 8) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(noise, sampling.initial_noise(1, 4, 3, 48, 64, seed=7))
    assert not torch.equal(noise, sampling.initial_noise(1, 4, 3, 48, 64, seed=8))
    wide = sampling.initial_noise(1, 128, 3, 64, 96, patch_size=1, spatial_compression=32, seed=7)
    assert wide.shape == (1, 128, 3, 2, 3)


# Guidance


def test_oscillation() -> None:
    assert [sampling.oscillate(7.5, i) for i in (0, 9, 10, 11, 12, 13)] == [7.5, 7.5, 7.5, 1.0, 7.5, 1.0]
    assert sampling.oscillate(7.5, 1, force_num=0) == 1.0


def test_guidance_by_text_and_image() -> None:
    c, u, w = (draw(2, 5, 3, seed=seed) for seed in range(3))
    torch.testing.assert_close(sampling.guide_text_and_image(c, u, w, 1.0, 1.0), c)
    torch.testing.assert_close(sampling.guide_text_and_image(c, u, w, 0.0, 1.0), u)
    torch.testing.assert_close(sampling.guide_text_and_image(c, u, w, 0.0, 0.0), w)
    torch.testing.assert_close(sampling.guide_text_and_image(c, u, w, 7.5, 3.0), w + 3 * (u - w) + 7.5 * (c - u))
    assert sampling.guide_text_and_image(c.bfloat16(), u.bfloat16(), w.bfloat16(), 7.5, 3.0).dtype == torch.bfloat16


def test_ramp_over_frames() -> None:
    ramp = sampling.frame_ramp(3.0, 0, 10, 5, 4)
    assert ramp.shape == (1, 20, 1)
    torch.testing.assert_close(ramp.view(5, 4), torch.linspace(1, 3, 5)[:, None].expand(5, 4))
    assert sampling.frame_ramp(3.0, 5, 10, 5, 4).max() == 2.0
    assert sampling.frame_ramp(3.0, 5, 10, 1, 4).max() == 1.0


# Sampling


class Straight:
    """The exact velocity of one data point: from any level on, Euler steps of any length end at it."""

    def __init__(self, data: Tensor, patch: int = 2) -> None:
        self.data, self.calls = pack_patches(data, patch), []

    def __call__(self, img: Tensor, timesteps: Tensor, **arguments: Tensor) -> Tensor:
        self.calls.append({"img": img, "timesteps": timesteps, **arguments})
        copies = len(img) // len(self.data)
        return (img - self.data.repeat(copies, 1, 1)) / timesteps.view(-1, 1, 1)


def test_sampling_ends_at_the_data() -> None:
    data, noise = draw(2, 4, 3, 4, 6, seed=1), draw(2, 4, 3, 4, 6, seed=2)
    levels = sampling.schedule(7, 6, 3)
    steps: list[int] = []
    sample = sampling.sample_guided(
        Straight(data), noise, levels, text(2), text(2, 5), on_step=lambda index, latents: steps.append(index)
    )
    torch.testing.assert_close(sample, data, rtol=1e-4, atol=1e-5)
    assert steps == list(range(7))
    sample = sampling.sample_distilled(Straight(data), noise, levels, text(2))
    torch.testing.assert_close(sample, data, rtol=1e-4, atol=1e-5)


def test_what_the_model_is_given() -> None:
    data, noise = draw(2, 4, 3, 4, 6, seed=1).bfloat16(), draw(2, 4, 3, 4, 6, seed=2).bfloat16()
    mask, masked = inference_condition(noise, "i2v_head", [[draw(4, 1, 4, 6)], None])
    model = Straight(data)
    positive, negative = text(2), text(2, 5)
    levels = sampling.schedule(3, 6, 3)
    sampling.sample_guided(model, noise, levels, positive, negative, mask=mask, masked_latent=masked, guidance=6.0)
    assert len(model.calls) == 3
    cond = pack_patches(torch.cat((mask, masked), 1), 2)
    for call, level in zip(model.calls, levels, strict=False):
        assert all(call[name].dtype == torch.bfloat16 for name in ("img", "timesteps", "txt", "y_vec", "cond"))
        assert torch.equal(call["timesteps"], level.expand(6).bfloat16()) and call["guidance"].eq(6).all()
        assert torch.equal(call["txt"], torch.cat([positive["txt"], negative["txt"], negative["txt"]]).bfloat16())
        assert torch.equal(call["cond"], torch.cat([cond, cond, torch.zeros_like(cond)]))
        assert torch.equal(call["img"][:2], call["img"][2:4]) and call["img"].shape == (6, 18, 16)
        assert call["img_ids"].shape == (18, 3) and call["img_ids"][-1].tolist() == [2, 1, 2]
        assert call["txt_ids"].shape == (3, 3) and not call["txt_ids"].any()


def test_two_branches_without_a_condition() -> None:
    torch.manual_seed(0)
    model = MMDiT(preset("tiny_i2v")).eval()
    torch.nn.init.normal_(model.cond_in.weight, std=0.2)
    noise, levels = draw(1, 4, 3, 4, 6, seed=2), sampling.schedule(4, 6, 3)
    mask, masked = inference_condition(noise, "t2v")
    batches = []

    def watched(**arguments: Tensor) -> Tensor:
        batches.append(len(arguments["img"]))
        return model(**arguments)

    ours = sampling.sample_guided(watched, noise, levels, text(), text(seed=5), mask=mask, masked_latent=masked)
    assert batches == [2] * 4
    # a condition so small that it changes nothing still makes three
    batches.clear()
    tiny = torch.full_like(mask, 1e-30)
    three = sampling.sample_guided(watched, noise, levels, text(), text(seed=5), mask=tiny, masked_latent=masked)
    assert batches == [3] * 4
    torch.testing.assert_close(ours, three, rtol=1e-4, atol=1e-5)


def test_image_guidance_reaches_the_sample() -> None:
    torch.manual_seed(0)
    model = MMDiT(preset("tiny_i2v")).eval()
    torch.nn.init.normal_(model.cond_in.weight, std=0.2)
    noise, levels = draw(1, 4, 3, 4, 6, seed=2), sampling.schedule(12, 6, 3)
    mask, masked = inference_condition(noise, "i2v_head", [[draw(4, 1, 4, 6)]])

    def sample(**options: Any) -> Tensor:
        return sampling.sample_guided(
            model, noise, levels, text(), text(seed=5), mask=mask, masked_latent=masked, **options
        )

    plain = {"text_osci": False, "image_osci": False, "scale_temporal_osci": False}
    wanted = sample(**plain)
    for name, change in (
        ("guidance", 3.0), ("guidance_img", 1.5), ("text_osci", True), ("image_osci", True),
        ("scale_temporal_osci", True),
    ):  # fmt: skip
        assert (sample(**{**plain, name: change}) - wanted).abs().max() > 1e-4, name


def test_sampling_refuses() -> None:
    noise, levels = draw(1, 4, 3, 4, 6), sampling.schedule(4, 6, 3)
    model, positive = Straight(noise), text()
    mask, masked = inference_condition(noise, "t2v")
    with pytest.raises(ValueError, match="go together"):
        sampling.sample_guided(model, noise, levels, positive, positive, mask=mask)
    with pytest.raises(ValueError, match=r"mask must be \(1, 1, 3, 4, 6\)"):
        sampling.sample_guided(model, noise, levels, positive, positive, mask=masked, masked_latent=masked)
    with pytest.raises(ValueError, match="txt and y_vec"):
        sampling.sample_guided(model, noise, levels, {"txt": positive["txt"]}, positive)
    with pytest.raises(ValueError, match=r"txt must be \(1, 3, 20\) in every"):
        sampling.sample_guided(model, noise, levels, positive, {**positive, "txt": positive["txt"][:, :2]})
    with pytest.raises(ValueError, match="multiples of 2"):
        sampling.sample_distilled(model, draw(1, 4, 3, 3, 6), levels, positive)
    with pytest.raises(ValueError, match="num_steps"):
        sampling.sample_distilled(model, noise, levels[:1], positive)
    with pytest.raises(ValueError, match="model must return"):
        sampling.sample_distilled(lambda **arguments: arguments["img"][:, 1:], noise, levels, positive)
    with pytest.raises(FloatingPointError, match="step 0 of 4"):
        sampling.sample_distilled(lambda **arguments: arguments["img"] / 0, noise, levels, positive)


# Conditions


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cond_type", CONDITION_TYPES)
def test_inference_conditions(cond_type: str, causal: bool) -> None:
    latent = draw(2, 4, 20, 2, 3)
    clip, other = draw(4, 18, 2, 3, seed=1), draw(4, 18, 2, 3, seed=2)
    mask, masked = inference_condition(latent, cond_type, [[clip, other], None], causal=causal)
    assert mask.shape == (2, 1, 20, 2, 3) and masked.shape == latent.shape
    assert not mask[1].any() and not masked[1].any()  # no reference: text to video
    n = given_frames(cond_type, causal=causal)
    given = {index for index in range(20) if mask[0, 0, index].all()}
    assert given == {index for index in range(20) if mask[0, 0, index].any()}
    head, tail = set(range(n)), set(range(20 - n, 20))
    name = cond_type.removesuffix("_easy")
    assert given == {"t2v": set(), "i2v_loop": head | tail}.get(name, head if "head" in name else tail)
    if name.endswith("head"):
        assert torch.equal(masked[0, :, :n], clip[:, :n])
    elif name == "v2v_tail":
        assert torch.equal(masked[0, :, -n:], clip[:, -n:])
    elif name == "i2v_tail":
        assert torch.equal(masked[0, :, -1], other[:, -1])
    elif name == "i2v_loop":
        assert torch.equal(masked[0, :, 0], clip[:, 0]) and torch.equal(masked[0, :, -1], other[:, -1])
    assert torch.equal(masked, masked * mask)


def test_images_have_no_condition() -> None:
    mask, masked = inference_condition(draw(1, 4, 1, 2, 3), "i2v_head", [[draw(4, 1, 2, 3)]])
    assert not mask.any() and not masked.any()


def test_reference_clips() -> None:
    first, second = draw(3, 70, 2, 2, seed=1), draw(3, 40, 2, 2, seed=2)

    def lengths(cond_type: str, *references: Tensor, **options: Any) -> list[int]:
        return [clip.shape[1] for clip in reference_clips(references, cond_type, **options)]

    assert reference_clips([], "t2v") == []
    assert torch.equal(reference_clips([first, second], "i2v_head")[0], first[:, :1])
    assert torch.equal(reference_clips([first, second], "i2v_tail")[0], second[:, -1:])
    loop = reference_clips([first, second], "i2v_loop")
    assert torch.equal(loop[0], first[:, :1]) and torch.equal(loop[1], second[:, -1:])
    assert torch.equal(reference_clips([first], "v2v_head")[0], first[:, :33])
    assert torch.equal(reference_clips([first], "v2v_tail", causal=False)[0], first[:, -32:])
    assert lengths("v2v_head_easy", first) == [65] and lengths("v2v_head_easy", first, causal=False) == [64]
    assert lengths("v2v_tail_easy", second) == [33]  # too short for 65
    assert lengths("v2v_head_easy", first[:, :64]) == [33]
    with pytest.raises(ValueError, match="at least 33 frames, got 32"):
        reference_clips([first[:, :32]], "v2v_head")
    with pytest.raises(ValueError, match="needs a reference"):
        reference_clips([], "i2v_head")
    with pytest.raises(ValueError, match="cond_type must be one of"):
        reference_clips([first], "v2v_head_half")


def test_easy_conditions_take_what_there_is() -> None:
    latent = draw(1, 4, 20, 2, 3)
    mask, _ = inference_condition(latent, "v2v_head_easy", [[draw(4, 9, 2, 3)]])
    assert mask[0, 0, :, 0, 0].sum() == 9
    with pytest.raises(ValueError, match="needs 9 latent frames, the reference has 8"):
        inference_condition(latent, "v2v_head", [[draw(4, 8, 2, 3)]])
    clip = draw(4, 9, 2, 3)
    for cond_type, wanted in (("v2v_head", clip[:, :5]), ("v2v_tail_easy", clip[:, -5:])):  # a video shorter than that
        mask, masked = inference_condition(latent[:, :, :5], cond_type, [[clip]])
        assert mask.all() and torch.equal(masked[0], wanted)


def test_conditions_refuse() -> None:
    latent = draw(2, 4, 5, 2, 3)
    with pytest.raises(ValueError, match="needs references for 2 samples, got none"):
        inference_condition(latent, "i2v_head")
    with pytest.raises(ValueError, match="for 2 samples, got 1"):
        inference_condition(latent, "i2v_head", [None])
    with pytest.raises(ValueError, match=r"sample 1 must be \(4, frames, 2, 3\), got \[\(4, 1, 2, 2\)\]"):
        inference_condition(latent, "i2v_head", [None, [draw(4, 1, 2, 2)]])
    with pytest.raises(ValueError, match="cond_type must be one of"):
        inference_condition(latent, "i2v")


def test_references_are_put_back_in_every_sample() -> None:
    latent = draw(2, 4, 5, 2, 3)
    references = [[draw(4, 1, 2, 3, seed=1)], [draw(4, 1, 2, 3, seed=2)]]
    mask, masked = inference_condition(latent, "i2v_loop", references)
    restored = restore_references(latent, mask, masked, "i2v_loop")
    assert torch.equal(restored[:, :, 1:-1], latent[:, :, 1:-1])
    for index in range(2):
        assert torch.equal(restored[index, :, :1], references[index][0])
        assert torch.equal(restored[index, :, -1:], references[index][0])
    first = restore_references(latent, mask, masked, "i2v_loop", first_sample_only=True)
    assert torch.equal(first[0], restored[0]) and torch.equal(first[1], latent[1])
    assert restore_references(latent, mask, masked, "v2v_head") is latent


def test_final_frames() -> None:
    video = torch.arange(20.0).view(1, 1, 20, 1, 1)

    def shown(cond_type: str, **options: Any) -> list[float]:
        frames = final_frames(video, 16, cond_type, **options).flatten().tolist()
        return [frames[0], frames[-1]]

    assert shown("i2v_loop") == [0, 15]
    assert shown("t2v", causal=False) == shown("v2v_head", causal=False) == [0, 15]
    assert shown("i2v_head", causal=False) == [3, 15]
    assert shown("i2v_tail", causal=False) == [0, 12]
    assert shown("i2v_loop", causal=False) == [3, 12]


def test_choice_of_training_conditions() -> None:
    weights = {"t2v": 1, "i2v_head": 5, "v2v_head": 2, "v2v_tail_easy": 4}
    before = dict(weights)
    rng = random.Random(0)
    seen = {frames: {choose_condition(weights, frames, rng) for _ in range(200)} for frames in (1, 9, 10, 17, 18)}
    assert seen[1] == seen[9] == {"t2v", "i2v_head"}
    assert seen[10] == seen[17] == {"t2v", "i2v_head", "v2v_head"}
    assert seen[18] == set(weights) and weights == before  # nothing is lost for longer videos
    short = {choose_condition(weights, 9, rng, causal=False) for _ in range(200)}
    assert short == {"t2v", "i2v_head", "v2v_head"}
    counts = [choose_condition(weights, 5, rng) for _ in range(3000)]
    assert counts.count("i2v_head") / 3000 == pytest.approx(5 / 6, abs=0.03)
    with pytest.raises(ValueError, match="no type with a positive weight"):
        choose_condition({"v2v_head": 1, "t2v": 0}, 5, rng)
    with pytest.raises(ValueError, match="must not be negative"):
        choose_condition({"t2v": -1}, 5, rng)
    with pytest.raises(ValueError, match="cond_type must be one of"):
        choose_condition({"i2v_both": 1}, 5, rng)


def encode(clip: Tensor) -> Tensor:
    """Stands in for an autoencoder: one latent frame for the first frame and one for each four after it."""
    return torch.cat([clip[:, :, :1], clip[:, :, 1:].unflatten(2, (-1, 4)).mean(3)], 2)


@pytest.mark.parametrize("causal", [True, False])
def test_training_conditions(causal: bool) -> None:
    video = draw(len(CONDITION_TYPES), 3, 73, 2, 2)
    latent = encode(video)
    given: list[int] = []

    def counted(clip: Tensor) -> Tensor:
        given.append(clip.shape[2])
        return encode(clip) if (clip.shape[2] - 1) % 4 == 0 else encode(clip[:, :, :1])

    mask, masked = training_condition(video, latent, CONDITION_TYPES, counted, causal=causal)
    assert given == ([1, 1, 1, 1, 33, 33, 65, 65] if causal else [1] * 4)
    wanted = [0, 1, 1, 2, *((9, 9, 17, 17) if causal else (8, 8, 16, 16))]
    assert mask[:, 0, :, 0, 0].sum(1).tolist() == wanted
    assert torch.equal(masked, masked * mask)
    assert torch.equal(masked[1, :, 0], video[1, :, 0]) and torch.equal(masked[2, :, -1], video[2, :, -1])
    if causal:
        assert torch.equal(masked[4, :, :9], encode(video[4:5, :, :33])[0])
        assert torch.equal(masked[7, :, -17:], encode(video[7:8, :, -65:])[0])
    else:
        assert torch.equal(masked[5, :, -8:], latent[5, :, -8:])
    with pytest.raises(ValueError, match="wanted 8 condition types, got 1"):
        training_condition(video, latent, ["t2v"], encode)


# Loss


def test_levels_follow_the_size() -> None:
    normal = torch.tensor([-1.0, 0.0, 2.0])
    wanted = torch.sigmoid(normal)
    a = sampling.resolution_shift(8 * 12 // 4, 3)
    torch.testing.assert_close(training_levels(normal, (3, 4, 3, 8, 12)), a * wanted / (1 + (a - 1) * wanted))


def test_target_leads_from_noise_to_data() -> None:
    clean, noise = draw(3, 5, 4), draw(3, 5, 4, seed=1)
    levels = torch.tensor([0.0, 0.4, 1.0])
    mixed, target = mix_with_noise(clean, noise, levels), velocity_target(clean, noise)
    torch.testing.assert_close(mixed - levels.view(3, 1, 1) * target, clean + 1e-5 * noise)
    torch.testing.assert_close(mixed[2], noise[2])


def test_dropped_text_is_the_empty_caption() -> None:
    tokens, null, uniform = draw(3, 5, 2), draw(1, 3, 2, seed=1), torch.tensor([0.1, 0.31622777, 0.9])
    dropped = drop_text(tokens, null, uniform)
    assert torch.equal(dropped[1:], tokens[1:])
    assert torch.equal(dropped[0], torch.cat([null[0], null[0, -1:], null[0, -1:]]))
    pooled = drop_text(draw(3, 4), draw(1, 4, seed=1), uniform, 1.0)
    assert torch.equal(pooled, draw(1, 4, seed=1).expand(3, 4))
    with pytest.raises(ValueError, match="null and uniform must be"):
        drop_text(tokens, null[..., :1], uniform)
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]"):
        drop_text(tokens, null, uniform, 1.5)


def plain_batch_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    losses = []
    for p, t, m in zip(prediction, target, mask.tolist(), strict=True):
        p, t = (x.unflatten(0, (len(m), -1)) for x in (p, t))
        start = 1 if m[0] == 1 and 1 not in m[1:-1] else 0
        stop = len(m) - (1 if m[-1] == 1 and 1 not in m[1:-1] else 0)
        losses.append((p[start:stop] - t[start:stop]).square().mean())
    return torch.stack(losses).mean()


def test_batch_loss_leaves_given_frames_out() -> None:
    rows = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    mask = torch.tensor(rows, dtype=torch.float32)
    prediction, target = draw(6, 12, 4), draw(6, 12, 4, seed=1)
    wanted = plain_batch_loss(prediction, target, mask)
    torch.testing.assert_close(batch_loss(prediction, target, mask), wanted)
    full = mask[:, None, :, None, None].expand(-1, 1, -1, 2, 3)
    torch.testing.assert_close(batch_loss(prediction, target, full), wanted)
    torch.testing.assert_close(batch_loss(prediction, target, full[:, 0]), wanted)
    torch.testing.assert_close(batch_loss(prediction, target), (prediction - target).square().mean())
    assert (wanted - batch_loss(prediction, target)).abs() > 1e-3
    assert batch_loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_batch_loss_refuses() -> None:
    prediction = draw(1, 6, 4)
    with pytest.raises(ValueError, match="every frame of a sample is given"):
        batch_loss(prediction, prediction, torch.ones(1, 2))
    with pytest.raises(ValueError, match="mask must be for 1 samples"):
        batch_loss(prediction, prediction, torch.ones(1, 4))
    with pytest.raises(ValueError, match="alike"):
        batch_loss(prediction, prediction[:, :3])


def test_training_inputs() -> None:
    latent, noise = draw(2, 4, 3, 4, 6), draw(2, 4, 3, 4, 6, seed=1)
    mask, masked = inference_condition(latent, "i2v_head", [[draw(4, 1, 4, 6)]] * 2)
    options = {**text(2), "normal": torch.tensor([0.3, -0.2]), "mask": mask, "masked_latent": masked}
    arguments, target = training_inputs(latent, noise=noise, **options)
    again, _ = training_inputs(latent, noise=pack_patches(noise, 2), **options)
    assert all(torch.equal(arguments[name], again[name]) for name in arguments)
    assert set(arguments) == {"img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "guidance", "cond"}
    assert torch.equal(arguments["cond"], pack_patches(torch.cat((mask, masked), 1), 2))
    torch.testing.assert_close(target, velocity_target(pack_patches(latent, 2), pack_patches(noise, 2)))
    half, _ = training_inputs(latent.bfloat16(), noise=noise, **options)
    assert all(t.dtype == torch.bfloat16 for name, t in half.items() if not name.endswith("ids"))
    MMDiT(preset("tiny_i2v"))(**arguments)
    plain, _ = training_inputs(latent, noise=noise, **text(2), normal=torch.zeros(2))
    MMDiT(preset("tiny"))(**plain)
    with pytest.raises(ValueError, match="go together"):
        training_inputs(latent, noise=noise, **text(2), normal=torch.zeros(2), mask=mask)
    with pytest.raises(ValueError, match="noise and normal must be"):
        training_inputs(latent, noise=noise[:, :, :2], **text(2), normal=torch.zeros(2))


def test_a_tiny_model_learns_its_samples() -> None:
    """Overfitting two latents at fixed draws: the loss falls below a fifth of what it was."""
    torch.manual_seed(0)
    model = MMDiT(preset("tiny_i2v"))
    latent = draw(2, 4, 2, 4, 4)
    mask, masked = inference_condition(latent, "i2v_head", [[latent[0, :, :1]], [latent[1, :, :1]]])
    arguments, target = training_inputs(
        latent, **text(2), normal=torch.tensor([0.5, -0.5]), noise=draw(2, 4, 2, 4, 4, seed=3), mask=mask,
        masked_latent=masked,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = batch_loss(model(**arguments), target, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
