# SPDX-License-Identifier: Apache-2.0
"""The four systems at tiny size with random weights: a forward and a backward pass, and three steps of training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accuracy import Verdict, tensors
from torch import Tensor, nn

from tests.npu.systems import build_transformer, build_vae, drawer, transformer_inputs, wake

SYSTEMS = ("opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox")
PARTS = ("transformer", "vae", "training")
MODEL_CASES = [f"{system}/{part}" for system in SYSTEMS for part in PARTS]
TINY = {"cogvideox": "tiny-1.5"}  # "tiny" elsewhere
# Norms over the few channels of the tiny ones enlarge every rounding.
VAES = {"opensora_plan_v1_3": "small", "opensora_plan_v1_5": "small"}
VIDEO = (9, 32, 48)
# Relative to the norm of each tensor; a share of it is what roundings of another order of sums make of it.
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def judge_model(system: str, part: str, dtype: torch.dtype, device: torch.device) -> tuple[Verdict, list[str]]:
    """Outputs and gradients, or losses, on the device: at most four times as far off as the CPU's."""
    torch.manual_seed(3)
    vae = part == "vae"
    model = build_vae(system, VAES.get(system, "tiny")) if vae else build_transformer(system, TINY.get(system, "tiny"))
    wake(model)
    run = train if part == "training" else forward_and_backward
    cpu = torch.device("cpu")
    truth = run(copy.deepcopy(model).double(), inputs_of(system, part, model, torch.float64, cpu))
    eager = run(copy.deepcopy(model).to(dtype), inputs_of(system, part, model, dtype, cpu))
    ours = run(copy.deepcopy(model).to(device, dtype), inputs_of(system, part, model, dtype, device))
    if dtype != torch.float32:  # of single small gradients bfloat16 leaves little; what counts is where they point
        truth, eager, ours = (gradients_as_one(found) for found in (truth, eager, ours))
    verdict, problems = Verdict(), []
    if not truth.keys() == eager.keys() == ours.keys():
        problems.append(f"{sorted(truth.keys() ^ ours.keys())[:3]} are missing, or too many")
    # Some gradients vanish, as those of biases ahead of a norm: what is left of them is rounding.
    total = 1e-2 * float(torch.stack([t.norm() for t in truth.values()]).norm())
    worst = ""
    for name in truth.keys() & ours.keys() & eager.keys():
        least = total if name.startswith("gradient") else 0.0
        error, allowed = (distance(run[name], truth[name], least) for run in (ours, eager))
        before = verdict.error, verdict.bound
        verdict.add(0, error, 4 * allowed + FLOOR[dtype])
        worst = name if (verdict.error, verdict.bound) != before else worst
    if verdict.why:
        verdict.why = f"{worst} is off by {verdict.error:.3g} of its norm, allowed are {verdict.bound:.3g}"
    return verdict, problems


def inputs_of(system: str, part: str, model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The same numbers in every dtype and on every device: drawn in bfloat16."""
    low = drawer(torch.device("cpu"), torch.bfloat16)
    if part == "vae":
        return {"video": low(1, 3, *VIDEO).to(device, dtype)}
    made = transformer_inputs(system, model.config, VIDEO, low, batch=2, tokens=8)
    return {name: value.to(device, dtype if value.dtype == torch.bfloat16 else None) for name, value in made.items()}


def forward_and_backward(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    outputs = outputs_of(model, inputs)
    draw = torch.Generator().manual_seed(5)
    weights = [(torch.randint(-16, 17, y.shape, generator=draw) / 8).to(y.device, y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    found = {f"output {i}": y for i, y in enumerate(outputs)}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def gradients_as_one(found: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: value for name, value in found.items() if name.startswith("gradient")}
    whole = {"gradient": torch.cat([parts[name].flatten() for name in sorted(parts)])} if parts else {}
    return {name: value for name, value in found.items() if name not in parts} | whole


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    if "video" not in inputs:
        return tensors(model(**inputs))
    moments = model.encode_moments(inputs["video"])
    mean = moments[:, : moments.shape[1] // 2]
    return [moments, model.decode(mean)]


def train(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of three steps of AdamW towards zero outputs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = {}
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([y.float().square().mean() for y in outputs_of(model, inputs)]).sum()
        loss.backward()
        optimizer.step()
        losses[f"loss {step}"] = loss.detach().cpu().double()
    return losses


def distance(a: Tensor, b: Tensor, least: float) -> float:
    """Relative to the norm of ``b``, or to ``least`` where that is larger."""
    return float((a - b).norm() / b.norm().clamp_min(max(least, 1e-6)))
