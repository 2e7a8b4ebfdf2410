# SPDX-License-Identifier: Apache-2.0
"""The ops inside a training process of Megatron, patched by MindSpeed where that is asked for.

    torchrun --nproc-per-node 2 examples/mindspeed_training.py [--steps 5] [--mindspeed]

A transformer block has its linear layers from megatron-core, cut over the ranks of a tensor-parallel group, and all
between them from `vidgen.ops`: each rank norms, rotates and attends with its own heads. With --mindspeed, which needs
an Ascend device, MindSpeed's adaptor first replaces functions of Megatron and torch by its own; vidgen itself never
imports it. Without torchrun there is one rank. Where something is missing, the program says what and ends with 3.

What was run of this is megatron-core 0.16.1 on CPUs. MindSpeed was not.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys

HEADS, HEAD_DIM, GRID, SECTIONS = 4, 32, (2, 4, 8), (8, 12, 12)
MISSING = 3


def what_is_missing(mindspeed: bool) -> str | None:
    """Nothing is imported to find out, but torch_npu, for its device."""
    if mindspeed:
        if importlib.util.find_spec("mindspeed") is None:
            return "--mindspeed: MindSpeed is not installed (it is not on PyPI; see its own documentation)"
        from vidgen import device

        if (reason := device.why_not("npu")) is not None:
            return f"--mindspeed: its adaptor needs an Ascend device: {reason}"
    if importlib.util.find_spec("megatron") is None:
        return "megatron-core is not installed: pip install --no-deps megatron-core"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a block of vidgen's ops and Megatron's layers to undo noise.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--mindspeed", action="store_true", help="patch Megatron with MindSpeed first (Ascend)")
    options = parser.parse_args()
    if (missing := what_is_missing(options.mindspeed)) is not None:
        print(missing, file=sys.stderr)
        return MISSING
    if options.mindspeed:
        # Ahead of every import of Megatron, which it patches; it reads the command line as that of Megatron's scripts.
        sys.argv = sys.argv[:1]
        importlib.import_module("mindspeed.megatron_adaptor")
    return train(options.steps, "npu" if options.mindspeed else "cpu")


def train(steps: int, kind: str) -> int:
    import torch
    from megatron.core import ModelParallelConfig, parallel_state

    from vidgen import device as devices

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29571"}.items():
        os.environ.setdefault(name, value)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = devices.resolve(kind if kind == "cpu" else f"{kind}:{rank}")
    torch.distributed.init_process_group(devices.communication_backend(device))
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    # Drawn on the CPU and then cut, the weights are the same for any number of ranks.
    config = ModelParallelConfig(tensor_model_parallel_size=ranks, use_cpu_initialization=True)
    config.perform_initialization, config.params_dtype = True, torch.float32

    torch.manual_seed(0)
    block = build_block(config).to(device)
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-3)
    tokens = GRID[0] * GRID[1] * GRID[2]
    target = torch.randn(1, tokens, HEADS * HEAD_DIM).to(device)
    noisy, condition = target + torch.randn(target.shape).to(device), torch.randn(1, HEADS * HEAD_DIM).to(device)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(block(noisy, condition), target)
        optimizer.zero_grad()
        loss.backward()
        for weight in (block.q_weight, block.k_weight):  # each rank has seen its own heads only
            torch.distributed.all_reduce(weight.grad, group=parallel_state.get_tensor_model_parallel_group())
        optimizer.step()
        losses.append(loss.item())
    if torch.distributed.get_rank() == 0:
        print(f"{ranks} ranks on {devices.describe(device)}: loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    torch.distributed.destroy_process_group()
    return 0


def build_block(config):  # type: ignore[no-untyped-def]
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from torch import nn

    from vidgen import ops

    channels = HEADS * HEAD_DIM
    common = {"config": config, "init_method": nn.init.xavier_uniform_, "bias": False, "skip_bias_add": False}

    class Block(nn.Module):
        """Skiparse attention of a rank's own heads, modulated and gated by a condition ``(batch, channels)``."""

        def __init__(self) -> None:
            super().__init__()
            self.condition = nn.Linear(channels, 3 * channels)
            # The rows of a rank are its heads, each with its q, k and v.
            self.qkv = ColumnParallelLinear(channels, 3 * channels, gather_output=False, **common)
            self.out = RowParallelLinear(channels, channels, input_is_parallel=True, **common)
            self.q_weight, self.k_weight = (nn.Parameter(torch.ones(HEAD_DIM)) for _ in range(2))

        def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            shift, scale, gate = self.condition(condition).chunk(3, dim=-1)
            qkv, _ = self.qkv(ops.adaln_modulate(x, shift, scale))
            q, k, v = qkv.unflatten(-1, (-1, 3, HEAD_DIM)).unbind(-2)
            cos, sin = (table.to(x.device) for table in ops.rope_3d_table(GRID, sections=SECTIONS))
            q, k = ops.qk_norm_rope(
                q, k, q_weight=self.q_weight, k_weight=self.k_weight, cos=cos, sin=sin, sections=SECTIONS
            )
            attended = ops.skiparse_attention(q, k, v, sparse_n=4, pattern="single")
            projected, _ = self.out(attended.flatten(2))
            return ops.gated_residual(x, gate, projected)

    return Block()


if __name__ == "__main__":
    sys.exit(main())
