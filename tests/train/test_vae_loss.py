# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vidgen.models.autoencoders import WFVAE, WFVAEOutput, preset
from vidgen.train.vae_loss import VAELossConfig, band_difference, kl_divergence, vae_loss


def new_output(video: torch.Tensor) -> WFVAEOutput:
    bands = torch.zeros(2, 24, 2, 1, 1), torch.zeros(2, 24, 1, 1, 1)
    shifted = bands[0] + 0.5, bands[1] - 0.25
    return WFVAEOutput(video + 0.1, torch.ones(2, 4, 2, 1, 1), torch.zeros(2, 4, 2, 1, 1), bands, shifted)


def test_terms_by_hand():
    video = torch.rand(2, 3, 9, 8, 8)
    loss, terms = vae_loss(new_output(video), video, VAELossConfig(2.0, 3.0, 5.0))
    torch.testing.assert_close(terms["reconstruction"], torch.tensor(0.1 * 3 * 8 * 8))  # per frame
    torch.testing.assert_close(terms["kl"], torch.tensor(0.5 * 4 * 2))  # mean 1, variance 1: 1/2 per element
    torch.testing.assert_close(terms["wavelet"], torch.tensor(0.5 * 48 + 0.25 * 24))
    torch.testing.assert_close(loss, 2 * terms["reconstruction"] + 3 * terms["kl"] + 5 * terms["wavelet"])
    assert not any(term.requires_grad for term in terms.values())


def test_default_weights():
    video = torch.rand(2, 3, 9, 8, 8)
    loss, terms = vae_loss(new_output(video), video)
    torch.testing.assert_close(loss, terms["reconstruction"] + 1e-6 * terms["kl"] + 0.1 * terms["wavelet"])


def test_kl_is_that_of_normal_distributions():
    mean, logvar = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    ours = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(ours, prior).sum() / 3
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_bands_are_compared_level_by_level():
    a, b = (torch.randn(2, 24, 2, 2, 2), torch.randn(2, 24, 1, 1, 1)), (torch.zeros(2, 24, 2, 2, 2), torch.zeros(1))
    torch.testing.assert_close(band_difference(a, b), (a[0].abs().sum() + a[1].abs().sum()) / 2)
    with pytest.raises(ValueError):
        band_difference(a, b[:1])


def test_low_precision_is_summed_in_float32():
    video = torch.zeros(1, 3, 1, 64, 64, dtype=torch.bfloat16)
    output = WFVAEOutput(video + 1, *(torch.zeros(1, 4, 1, 8, 8).bfloat16() for _ in range(2)), (video,), (video,))
    loss, terms = vae_loss(output, video)
    assert loss.dtype == torch.float32 and terms["reconstruction"] == 3 * 64 * 64


def test_training_brings_every_term_down():
    torch.manual_seed(0)
    vae = WFVAE(preset("tiny"))
    video = torch.linspace(-1, 1, 16).expand(1, 3, 9, 16, 16)
    noise = torch.randn(1, 4, 2, 2, 2)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    history = []
    for _ in range(12):
        loss, terms = vae_loss(vae(video, noise=noise), video, VAELossConfig(kl_weight=10.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(terms)
    for name in ("reconstruction", "kl", "wavelet"):
        assert history[-1][name] < 0.9 * history[0][name], name


def test_the_encoder_feels_the_wavelet_term():
    """Its own bands are constants of the video, but the decoder's reach it through the latent."""
    torch.manual_seed(0)
    vae = WFVAE(preset("tiny"))
    video = torch.rand(1, 3, 9, 16, 16)
    loss, _ = vae_loss(vae(video, generator=torch.Generator().manual_seed(0)), video, VAELossConfig(0.0, 0.0, 1.0))
    loss.backward()
    assert vae.encoder.conv_out.conv.weight.grad.abs().sum() > 0
    assert vae.decoder.connect_l1[-1].weight.grad.abs().sum() > 0
    assert vae.decoder.layer[0].conv1.conv.weight.grad is None or not vae.decoder.layer[0].conv1.conv.weight.grad.any()


def test_refusals():
    video = torch.rand(2, 3, 9, 8, 8)
    with pytest.raises(ValueError, match="video must be"):
        vae_loss(new_output(video), video[:, :, :8])
    with pytest.raises(ValueError, match="kl_weight=-1"):
        VAELossConfig(kl_weight=-1)
