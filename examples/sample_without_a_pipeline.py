# SPDX-License-Identifier: Apache-2.0
"""Sampling by hand: a transformer, a noise schedule, guidance, a VAE. For those who build their own pipeline.

    python examples/sample_without_a_pipeline.py [--transformer FOLDER --vae FOLDER] [--steps 8]

Without folders the networks are tiny and untrained. The text is random here; `vidgen.models.text` has the encoders.
"""

from __future__ import annotations

import argparse

import torch

from vidgen.diffusion import sample, shifted_linear_schedule
from vidgen.models import autoencoders, opensora_plan_v1_5
from vidgen.models.autoencoders import WFVAE
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT


def main() -> None:
    parser = argparse.ArgumentParser(description="Noise to video with Open-Sora Plan v1.5.")
    parser.add_argument("--transformer")
    parser.add_argument("--vae")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.transformer:
        transformer = SparseUMMDiT.from_pretrained(options.transformer)
    else:
        transformer = SparseUMMDiT(opensora_plan_v1_5.preset("tiny"))
    vae = WFVAE.from_pretrained(options.vae) if options.vae else WFVAE(autoencoders.preset("tiny"))
    config = transformer.eval().config

    def text() -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": torch.randn(1, 16, config.caption_channels),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        }

    noise = torch.randn(1, config.in_channels, 3, 8, 12)  # 17 frames of 64x96 pixels
    latents = sample(
        transformer,
        noise,
        shifted_linear_schedule(options.steps, 7.0),
        text(),
        negative_conditioning=text(),
        guidance_scale=8.0,
        guidance_rescale=0.7,
        on_step=lambda step, x: print(f"step {step + 1}: spread {x.std():.3f}"),
    )
    if vae.config.latent_dim != config.out_channels:
        raise SystemExit(f"the VAE has {vae.config.latent_dim} latent channels, the transformer {config.out_channels}")
    with torch.no_grad():
        video = vae.decode(latents)
    print(f"video {tuple(video.shape)}, values from {video.min():.2f} to {video.max():.2f}")


if __name__ == "__main__":
    main()
