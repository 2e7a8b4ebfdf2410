# SPDX-License-Identifier: Apache-2.0
"""Which frames are given: kinds of masks, their compression, blackened videos, noise on what is given."""

import pytest
import torch

from vidgen.diffusion.inpaint import (
    MASK_TYPES,
    VIDEO_MASK_RATIOS,
    add_condition_noise,
    compress_mask,
    condition_noise_levels,
    draw_mask_type,
    frame_mask,
    hide_generated,
    place_frames,
)


def test_fixed_kinds() -> None:
    expected = {"t2iv": [1, 1, 1, 1, 1], "i2v": [0, 1, 1, 1, 1], "transition": [0, 1, 1, 1, 0], "clear": [0] * 5}
    for kind, wanted in expected.items():
        assert frame_mask(kind, 5).tolist() == wanted
    assert {kind: frame_mask(kind, 1).item() for kind in expected} == dict.fromkeys(expected, 0.0) | {"t2iv": 1.0}


@pytest.mark.parametrize("kind", ["continuation", "random_temporal"])
def test_drawn_kinds(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [frame_mask(kind, 10, min_clear_ratio=0.25, max_clear_ratio=0.55, generator=generator) for _ in range(300)]
    given = [int((mask == 0).sum()) for mask in masks]
    assert set(given) == {2, 3, 4, 5, 6}  # 2.5 rounded down to 5.5 rounded up
    first = [mask[: int(n)].sum() == 0 for mask, n in zip(masks, given, strict=True)]
    assert all(first) if kind == "continuation" else sum(first) < 100
    assert all((torch.stack(masks) == 0).any(0)[: 6 if kind == "continuation" else 10])


def test_kinds_come_as_often_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_mask_type(VIDEO_MASK_RATIOS, generator) for _ in range(4000)]
    share = {kind: drawn.count(kind) / 4000 for kind in MASK_TYPES}
    for kind, ratio in VIDEO_MASK_RATIOS.items():
        assert abs(share[kind] - ratio / 20) < 0.03, kind
    assert share["clear"] == 0
    assert {draw_mask_type({"t2iv": 0, "clear": 0}, generator) for _ in range(50)} == {"t2iv", "clear"}


@pytest.mark.parametrize("frames", [1, 5, 9, 8])
def test_compressed_mask_holds_every_frame(frames: int) -> None:
    values = torch.arange(1.0, frames + 1)
    mask = values.view(1, 1, -1, 1, 1).expand(2, 1, -1, 16, 24)
    small = compress_mask(mask)
    assert small.shape == (2, 4, (frames + 3) // 4, 2, 3)
    first = [1.0] * 4 if frames % 4 else [1.0, 2.0, 3.0, 4.0]
    assert small[0, :, 0, 0, 0].tolist() == first
    if frames == 9:
        assert small[1, :, :, 1, 2].T.tolist() == [[1, 1, 1, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_other_sizes_of_latents() -> None:
    mask = torch.rand(1, 1, 17, 32, 32).round()
    small = compress_mask(mask, frames_per_latent=8, pixels_per_latent=16)
    assert small.shape == (1, 8, 3, 2, 2)
    assert compress_mask(mask[:, :, :, :8, :8], frames_per_latent=1).shape == (1, 1, 17, 1, 1)


def test_frames_take_their_places() -> None:
    frames = torch.rand(3, 2, 4, 4)
    video, mask = place_frames(frames, (0, -1), 5)
    assert mask.tolist() == frame_mask("transition", 5).tolist()
    assert torch.equal(video[:, 0], frames[:, 0]) and torch.equal(video[:, 4], frames[:, 1])
    assert (video[:, 1:4] == -1).all()
    whole = torch.rand(3, 5, 4, 4)
    assert torch.equal(hide_generated(whole, mask.view(1, -1, 1, 1))[:, ::4], whole[:, ::4])
    assert (hide_generated(whole, mask.view(1, -1, 1, 1))[:, 1:4] == -1).all()


def test_noise_only_on_what_is_given() -> None:
    video, noise = torch.zeros(2, 3, 5, 4, 4), torch.randn(2, 3, 5, 4, 4)
    mask = frame_mask("i2v", 5).view(1, 1, -1, 1, 1)
    noisy = add_condition_noise(video, mask, torch.tensor([0.5, 0.0]), noise)
    torch.testing.assert_close(noisy[0, :, 0], 0.5 * noise[0, :, 0])
    assert not noisy[:, :, 1:].any() and not noisy[1].any()
    levels = condition_noise_levels(4000, generator=torch.Generator().manual_seed(0))
    assert abs(float((levels == 0).float().mean()) - 0.05) < 0.015
    logs = levels[levels > 0].log()
    assert abs(float(logs.mean()) + 3) < 0.05 and abs(float(logs.std()) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frame_mask("i2i", 5), "kind must be one of t2iv, i2v"),
        (lambda: frame_mask("i2v", 0), "num_frames must be at least 1"),
        (lambda: frame_mask("continuation", 5, min_clear_ratio=0.6, max_clear_ratio=0.5), "ratios must be"),
        (lambda: draw_mask_type({}), "ratios must be"),
        (lambda: draw_mask_type({"i2i": 1}), "ratios must be"),
        (lambda: draw_mask_type({"i2v": -1}), "ratios must be"),
        (lambda: compress_mask(torch.ones(1, 1, 7, 8, 8)), "mask must be"),
        (lambda: compress_mask(torch.ones(1, 1, 5, 12, 8)), "mask must be"),
        (lambda: compress_mask(torch.ones(1, 5, 8, 8)), "mask must be"),
        (lambda: place_frames(torch.ones(3, 2, 4, 4), (0,), 5), "indices must be"),
        (lambda: place_frames(torch.ones(3, 2, 4, 4), (0, 5), 5), "indices must be"),
        (lambda: place_frames(torch.ones(3, 2, 4, 4), (4, -1), 5), "indices must be"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
