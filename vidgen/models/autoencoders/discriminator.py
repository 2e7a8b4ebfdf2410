# SPDX-License-Identifier: Apache-2.0
"""PatchDiscriminator3D: judges patches of a video as real or reconstructed (PatchGAN, arXiv 1611.07004, in 3-D).

Follows NLayerDiscriminator3D of Open-Sora Plan v1.3, with its parameter names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST_TIMES_WIDER = 8
SLOPE = 0.2
INITIAL_STD = 0.02


class PatchDiscriminator3D(nn.Module):
    """Video ``(B, 3, T, H, W)`` to one logit for each patch ``(B, 1, t, h, w)``; positive for real.

    Convolutions of 3x3x3: the first two halve time, height and width, further ones height and width only. Norms are
    BatchNorm: in training the logits of a video depend on the batch, and every pass moves the running statistics.
    """

    def __init__(self, width: int = 64, num_layers: int = 4, channels: int = 3) -> None:
        super().__init__()
        if width < 1 or num_layers < 1:
            raise ValueError(
                f"PatchDiscriminator3D: width and num_layers must be at least 1, got {width}, {num_layers}"
            )
        layers: list[nn.Module] = [nn.Conv3d(channels, width, 3, 2, 1), nn.LeakyReLU(SLOPE)]
        before = width
        for n in range(1, num_layers + 1):
            after = width * min(2**n, MOST_TIMES_WIDER)
            stride = (1, 1, 1) if n == num_layers else ((2, 2, 2) if n == 1 else (1, 2, 2))
            layers += [
                nn.Conv3d(before, after, 3, stride, 1, bias=False),
                nn.BatchNorm3d(after),
                nn.LeakyReLU(SLOPE),
            ]
            before = after
        self.main = nn.Sequential(*layers, nn.Conv3d(before, 1, 3, 1, 1))
        self.init_weights()

    def forward(self, video: Tensor) -> Tensor:
        return self.main(video)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Kernels normal around 0 and scales of norms around 1, both with standard deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, INITIAL_STD, generator=generator)
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.normal_(module.weight, 1.0, INITIAL_STD, generator=generator)
                nn.init.zeros_(module.bias)
