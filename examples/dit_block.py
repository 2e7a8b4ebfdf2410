# SPDX-License-Identifier: Apache-2.0
"""A transformer block of a video DiT from `vidgen.ops` alone, trained for a few steps.

    python examples/dit_block.py [--steps 20] [--compile]

Needs nothing but PyTorch. The ops work in eager mode, under autograd and under torch.compile.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen import ops

GRID = (5, 8, 12)  # frames, rows, columns of tokens
SECTIONS = (16, 24, 24)  # channels of a head that turn with each of them


class Block(nn.Module):
    """Skiparse attention, then a feed-forward network, both modulated by a condition ``(batch, channels)``."""

    def __init__(self, heads: int, head_dim: int, sparse_n: int) -> None:
        super().__init__()
        channels = heads * head_dim
        self.heads, self.sparse_n = heads, sparse_n
        self.condition = nn.Linear(channels, 6 * channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(approximate="tanh"), nn.Linear(4 * channels, channels)
        )
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(head_dim)) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(F.silu(condition)).chunk(6, dim=-1)
        qkv = self.qkv(ops.adaln_modulate(x, shift, scale)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(2)
        q, k = ops.qk_norm_rope(
            q, k, q_weight=self.q_weight, k_weight=self.k_weight, cos=cos, sin=sin, sections=SECTIONS
        )
        attended = ops.skiparse_attention(q, k, v, sparse_n=self.sparse_n, pattern="single")
        x, modulated = ops.gated_residual_adaln(x, gate, self.out(attended.flatten(2)), shift2, scale2)
        return ops.gated_residual(x, gate2, self.feed_forward(modulated))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one block to undo noise.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="through torch.compile, without graph breaks")
    options = parser.parse_args()

    torch.manual_seed(0)
    block = Block(heads=2, head_dim=sum(SECTIONS), sparse_n=4)
    run = torch.compile(block, fullgraph=True) if options.compile else block
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
    cos, sin = ops.rope_3d_table(GRID, sections=SECTIONS)
    # Tokens of a sample are alike, so that attention can tell them from their noise.
    clean = torch.randn(2, 1, 2 * sum(SECTIONS)).repeat(1, GRID[0] * GRID[1] * GRID[2], 1)
    condition = torch.randn(2, clean.shape[-1])
    losses = []
    for _ in range(options.steps):
        loss = F.mse_loss(run(clean + 0.5 * torch.randn_like(clean), condition, cos, sin), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {options.steps} steps")

    # The same block on the plain-PyTorch reference of every op: what a kernel may differ by is rounding.
    with torch.no_grad():
        fast = block(clean, condition, cos, sin)
        with ops.use_backend("reference"):
            plain = block(clean, condition, cos, sin)
    print(f"kernels against reference: largest difference {(fast - plain).abs().max():.1e}")
    shift = condition[:, : clean.shape[-1]]
    print(ops.explain("adaln_modulate", clean, shift, shift))


if __name__ == "__main__":
    main()
