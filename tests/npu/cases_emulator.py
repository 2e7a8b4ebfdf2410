# SPDX-License-Identifier: Apache-2.0
"""What test_emulator.py asks of the emulator itself, against plain PyTorch on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .emulator import NpuEmulator, same_memory
from .emulator_reference import REFERENCE


def launch_outside_fails() -> None:
    x = torch.ones(2).npu()
    with pytest.raises(RuntimeError):
        _ = (x + 1).cpu()


def unknown_operator_raises() -> None:
    x = torch.ones(2, 4).npu()
    with NpuEmulator({}), pytest.raises(NotImplementedError, match="npu::npu_swiglu"):
        torch.ops.npu.npu_swiglu(x)


def memory_is_shared() -> None:
    x = torch.arange(24.0).npu().view(2, 3, 4)[:, 1:, ::2]
    low = same_memory(x)
    low.mul_(2)
    assert low.stride() == x.stride() and low.device.type == "cpu"
    whole = x._base.cpu()
    assert whole.view(2, 3, 4)[:, 1:, ::2].equal(2 * torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2])
    assert whole[:4].equal(torch.arange(4.0))


def plain_operators() -> None:
    """In place through views, factories, casts, scalars, mixed devices, indexing."""

    def program(device: str) -> list[torch.Tensor | float]:
        x = torch.arange(24, device=device).float().reshape(2, 3, 4)
        x[:, 1].add_(x[:, 0].clone()).mul_(torch.tensor(0.5))
        x.transpose(1, 2)[..., 0] = 7.0
        y = torch.zeros(3, dtype=torch.bfloat16, device=device)
        y.copy_(x[0, :, 1])
        z = torch.where(x > 5, x, torch.full((), -1.0, device=device))[torch.tensor([1, 0], device=device)]
        out = torch.empty(2, 4, device=device)
        torch.sum(z, 1, out=out)
        assert z.device.type == y.to(torch.float64).device.type == out.device.type == device
        return [x.cpu(), y.to("cpu", torch.float32), z.cpu(), out.cpu(), x.double().mean().item()]

    wanted = program("cpu")
    with NpuEmulator(REFERENCE) as emulator:
        got = program("npu")
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert emulator.calls["aten::mul_"] == emulator.calls["aten::where"] == 1


def attention_and_gradient() -> None:
    import torch_npu

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 32, 16).npu().requires_grad_() for _ in range(3))
    linear = nn.Linear(16, 16)
    with NpuEmulator(REFERENCE) as emulator:
        there = nn.Linear(16, 16).npu()
        there.load_state_dict(linear.state_dict())
        y = there(torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=0.25)[0])
        y.square().sum().backward()
        got = [y.detach().cpu(), *(t.grad.cpu() for t in (q, k, v, there.weight))]
    qc, kc, vc = (t.detach().cpu().requires_grad_() for t in (q, k, v))
    wanted = linear(F.scaled_dot_product_attention(qc, kc, vc, scale=0.25))
    wanted.square().sum().backward()
    torch.testing.assert_close(got, [wanted.detach(), *(t.grad for t in (qc, kc, vc, linear.weight))])
    assert emulator.calls["npu::npu_fusion_attention"] == emulator.calls["npu::npu_fusion_attention_grad"] == 1


def ring_merge() -> None:
    """Attention over two halves of the keys, merged, is attention over all keys."""
    import torch_npu

    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 2, 4 * 16).npu() for _ in range(3))
    with NpuEmulator(REFERENCE):
        wanted = torch_npu.npu_fusion_attention(q, k, v, 4, "SBH", scale=0.25)[:3]
        halves = [
            torch_npu.npu_fusion_attention(q, k[part].contiguous(), v[part].contiguous(), 4, "SBH", scale=0.25)[:3]
            for part in (slice(0, 3), slice(3, 6))
        ]
        got = torch.ops.npu.npu_ring_attention_update(*halves[0], *halves[1], input_layout="SBH")
        torch.testing.assert_close([t.cpu() for t in got], [t.cpu() for t in wanted])
