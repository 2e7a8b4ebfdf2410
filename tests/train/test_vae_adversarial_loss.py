# SPDX-License-Identifier: Apache-2.0
"""Losses of a VAE that is trained against a discriminator. Values are held against tests/goldens."""

import pytest
import torch
from torch import Tensor, nn

from vidgen.models.autoencoders import WFVAE, WFVAEOutput, preset
from vidgen.models.autoencoders.discriminator import PatchDiscriminator3D
from vidgen.train.vae_adversarial_loss import (
    AdversarialLossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    trains_discriminator,
)
from vidgen.train.vae_loss import vae_loss

QUIET = {"perceptual_weight": 0.0}


class Mean(nn.Module):
    """A judge whose logit is the mean, times a number."""

    def forward(self, video: Tensor) -> Tensor:
        return 2 * video.mean((1, 2, 3, 4))


def new_output(video: Tensor, scale: Tensor) -> WFVAEOutput:
    bands = (torch.zeros(2, 12, 2, 1, 1), torch.zeros(2, 24, 1, 1, 1))
    shifted = (bands[0] + 0.5, bands[1] - 0.25)
    return WFVAEOutput(video * scale, torch.ones(2, 4, 2, 1, 1), torch.zeros(2, 4, 2, 1, 1), bands, shifted)


def new_video() -> Tensor:
    return torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1


def test_terms_by_hand() -> None:
    video, scale = new_video(), torch.tensor([0.5], requires_grad=True)
    config = AdversarialLossConfig(2.0, 3.0, 0.0, 0.25, logvar=0.3)
    output = new_output(video, scale)
    loss, terms = generator_loss(output, video, Mean(), scale, 0, config)
    per_frame = 2 * 5
    factor = torch.exp(torch.tensor(-0.3))
    reconstruction = (0.5 * video * factor + 0.3).sum() / per_frame
    torch.testing.assert_close(terms["reconstruction"], reconstruction)
    torch.testing.assert_close(terms["adversarial"], -video.mean())
    # d/dscale of the two
    ours, theirs = (video * factor).sum() / per_frame, 2 * video.mean()
    torch.testing.assert_close(terms["adversarial_weight"], 0.25 * ours / (theirs + 1e-4), rtol=1e-4, atol=0)
    expected = (
        reconstruction + 2 * terms["kl"] + 3 * terms["wavelet"] + terms["adversarial_weight"] * terms["adversarial"]
    )
    torch.testing.assert_close(loss, expected)
    assert not any(term.requires_grad for term in terms.values())
    assert torch.autograd.grad(loss, scale)[0].isfinite()


def test_without_a_discriminator_it_is_the_plain_loss() -> None:
    video, scale = new_video(), torch.tensor([0.5], requires_grad=True)
    output = new_output(video, scale)
    config = AdversarialLossConfig(**QUIET, adversarial_start=5)

    def never(_: Tensor) -> Tensor:
        raise AssertionError("asked too early")

    loss, terms = generator_loss(output, video, never, scale, 4, config)
    torch.testing.assert_close(loss, vae_loss(output, video)[0])
    assert terms["adversarial"] == terms["adversarial_weight"] == 0
    with pytest.raises(AssertionError, match="asked too early"):
        generator_loss(output, video, never, scale, 5, config)


def test_squares_and_perceptual_distances() -> None:
    video, scale = new_video(), torch.tensor([0.5], requires_grad=True)
    seen = []

    def perceptual(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return torch.arange(10.0).view(10, 1, 1, 1)  # as LPIPS returns it

    config = AdversarialLossConfig(perceptual_weight=2.0, distance="l2", adversarial_weight=0.0)
    _, terms = generator_loss(new_output(video, scale), video, Mean(), scale, 0, config, perceptual=perceptual)
    expected = ((0.5 * video).square().sum() + 2 * torch.arange(10.0).sum() * 3 * 64) / 10
    torch.testing.assert_close(terms["reconstruction"], expected)
    assert torch.equal(seen[0][0][6], video[1, :, 1]) and seen[0][1].requires_grad


def test_adaptive_weight_is_bounded() -> None:
    w = torch.ones(3, requires_grad=True)
    assert adaptive_weight((w * 1e9).sum(), (w * 1e-6).sum(), w) == 1e4
    assert adaptive_weight((w * 0).sum(), w.sum(), w) == 0


def test_hinge_loss() -> None:
    real, fake = torch.full((1, 3, 1, 2, 2), 0.25), torch.full((1, 3, 1, 2, 2), 0.1, requires_grad=True)
    loss, terms = discriminator_loss(Mean(), real, fake)
    torch.testing.assert_close(loss, torch.tensor(((1 - 0.5) + (1 + 0.2)) / 2))
    torch.testing.assert_close(terms, {"real": torch.tensor(0.5), "reconstructed": torch.tensor(0.2)})
    assert not loss.requires_grad  # nothing reaches the videos
    assert discriminator_loss(Mean(), real + 2, fake - 2)[0] == 0


def test_turns() -> None:
    config = AdversarialLossConfig(adversarial_start=4)
    assert [step for step in range(9) if trains_discriminator(step, config)] == [5, 7]


def test_bad_arguments() -> None:
    video, scale = new_video(), torch.tensor([0.5], requires_grad=True)
    with pytest.raises(ValueError, match="needs perceptual"):
        generator_loss(new_output(video, scale), video, Mean(), scale, 0)
    with pytest.raises(ValueError, match="video must be"):
        generator_loss(new_output(video, scale), video[:, :, 1:], Mean(), scale, 0, AdversarialLossConfig(**QUIET))
    with pytest.raises(ValueError, match="kl_weight=-1"):
        AdversarialLossConfig(kl_weight=-1)
    with pytest.raises(ValueError, match="distance"):
        AdversarialLossConfig(distance="l3")  # type: ignore[arg-type]


def test_both_sides_learn() -> None:
    """A few turns: the discriminator tells better, and gradients reach the whole VAE."""
    torch.manual_seed(0)
    vae, judge = WFVAE(preset("tiny_4x8x8")).train(), PatchDiscriminator3D(8, 2)
    video = torch.linspace(-1, 1, 16).expand(1, 3, 5, 16, 16) * torch.linspace(0.5, 1, 5).view(1, 1, -1, 1, 1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    with torch.no_grad():
        fixed = vae(video, noise=torch.zeros(1, 4, 2, 2, 2)).reconstruction
    losses = []
    for _ in range(15):
        loss, _ = discriminator_loss(judge, video, fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    output = vae(video, noise=torch.zeros(1, 4, 2, 2, 2))
    last = vae.decoder.conv_out.weight
    loss, terms = generator_loss(output, video, judge, last, 0, AdversarialLossConfig(**QUIET))
    assert terms["adversarial_weight"] > 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
