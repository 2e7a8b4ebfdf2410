# SPDX-License-Identifier: Apache-2.0
"""Tiny systems on the emulated device against the same on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.train.optimizer import EMAAdamW

from .emulator import NpuEmulator
from .emulator_reference import REFERENCE
from .systems import Size, build_transformer, build_vae, drawer, latent_size, transformer_inputs, wake

CPU, NPU = torch.device("cpu"), torch.device("npu:0")
STEPS = 3


def run_steps(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Output, gradients of the first step, losses of all, and weights and averages after the last."""
    # of a gradient far below eps, which is rounding where the true one is 0, little comes through
    optimizer = EMAAdamW(model.parameters(), lr=1e-3, eps=1e-4, ema_decay=0.9)
    found: dict[str, Any] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        output = model(**inputs)
        loss = output.square().mean()
        loss.backward()
        if step == 0:
            found["output"] = output.detach().cpu()
            found |= gradients_of(model)
        optimizer.step()
        found[f"loss {step}"] = loss.item()
    found |= {f"weight of {name}": p.detach().cpu().clone() for name, p in model.named_parameters()}
    with optimizer.use_ema():
        found |= {f"average of {name}": p.detach().cpu().clone() for name, p in model.named_parameters()}
    return found


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"gradient of {name}": p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def transformer(system: str, preset: str, video: Size) -> dict[str, int]:
    torch.manual_seed(0)
    model = build_transformer(system, preset)
    wake(model)
    with NpuEmulator(REFERENCE) as emulator:
        there = copy.deepcopy(model).to(NPU)
        got = run_steps(there, transformer_inputs(system, there.config, video, drawer(NPU, torch.float32), 2, 8))
    wanted = run_steps(model, transformer_inputs(system, model.config, video, drawer(CPU, torch.float32), 2, 8))
    gradients = [value.any() for name, value in wanted.items() if "gradient" in name]
    assert sum(gradients) > 0.8 * len(gradients)  # the last block's answer to the text is thrown away in some systems
    assert_equal(got, wanted)
    return dict(emulator.calls)


def assert_equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """To 1e-5, of the largest value where that is above 1; all that differ are named."""
    assert got.keys() == wanted.keys()
    wrong = []
    for name, value in wanted.items():
        a, b = torch.as_tensor(got[name]), torch.as_tensor(value)
        error, limit = float((a - b).abs().max()), 1e-5 * max(1.0, float(b.abs().max()))
        if a.shape != b.shape or a.dtype != b.dtype or not error <= limit:
            wrong.append(f"{name}: {error:.1e} > {limit:.1e}, {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}")
    assert not wrong, "\n".join(wrong)


def vae(system: str, preset: str, video: Size) -> dict[str, int]:
    """Moments of a video, their gradient, the video that the latent decodes to, and its gradient."""
    torch.manual_seed(0)
    model = build_vae(system, preset)

    def run(model: nn.Module, device: torch.device) -> dict[str, Any]:
        draw = drawer(device, torch.float32)
        pixels = draw(1, 3, *video).clamp(-1, 1).requires_grad_()
        moments = model.encode_moments(pixels)
        latent = draw(1, moments.shape[1] // 2, *latent_size(system, video)).requires_grad_()
        decoded = model.decode(latent)
        (moments.square().mean() + decoded.square().mean()).backward()
        found = {"moments": moments, "video": decoded, "gradient of video": pixels.grad, "gradient": latent.grad}
        return {name: value.detach().cpu() for name, value in found.items()} | gradients_of(model)

    with NpuEmulator(REFERENCE) as emulator:
        got = run(copy.deepcopy(model).to(NPU), NPU)
    assert_equal(got, run(model, CPU))
    return dict(emulator.calls)
