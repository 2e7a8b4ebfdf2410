# SPDX-License-Identifier: Apache-2.0
"""Verification rung 4: the four systems at tiny size on the emulated device equal the CPU."""

from typing import Any

import pytest

from .worker import Worker

VIDEO = (9, 32, 48)
# what of torch_npu each system has to reach, its gradients included
ATTENTION = {"npu_fusion_attention", "npu_fusion_attention_grad"}
ROTATED = ATTENTION | {"npu_rotary_mul"}
RMS_NORMED = ROTATED | {"npu_rms_norm", "npu_rms_norm_backward"}
TRANSFORMERS = [
    ("opensora_plan_v1_3", "tiny", ROTATED),
    ("opensora_plan_v1_3", "tiny_i2v", ROTATED),
    ("opensora_plan_v1_5", "tiny", RMS_NORMED),
    ("opensora_v2", "tiny", RMS_NORMED),
    ("opensora_v2", "tiny_i2v", RMS_NORMED),
    ("cogvideox", "tiny-2b", ATTENTION),
    ("cogvideox", "tiny-5b", ROTATED),
    ("cogvideox", "tiny-5b-i2v", ROTATED),
    ("cogvideox", "tiny-1.5", ROTATED),
    ("cogvideox", "tiny-1.5-i2v", ROTATED),
]
GROUP_NORMED = {"npu_group_norm_swish", "npu_group_norm_swish_grad"}
AUTOENCODERS = [
    ("opensora_plan_v1_3", "small", ATTENTION),  # norms over the few channels of the tiny one enlarge every rounding
    ("opensora_plan_v1_5", "small", ATTENTION),
    ("opensora_v2", "tiny", ATTENTION | GROUP_NORMED),
    ("cogvideox", "tiny", GROUP_NORMED),
]


def named(cases: list[tuple[str, str, set[str]]]) -> list[Any]:
    return [pytest.param(*case, id="-".join(case[:2])) for case in cases]


@pytest.mark.parametrize("system, preset, reached", named(TRANSFORMERS))
def test_forward_backward_and_three_steps(npu: Worker, system: str, preset: str, reached: set[str]) -> None:
    video = (9, 48, 80) if preset == "tiny-5b-i2v" else VIDEO  # its positions are learned for this size
    calls = npu.run("cases_systems.transformer", system=system, preset=preset, video=video)
    assert_reached(calls, reached)


@pytest.mark.parametrize("system, preset, reached", named(AUTOENCODERS))
def test_autoencoder(npu: Worker, system: str, preset: str, reached: set[str]) -> None:
    assert_reached(npu.run("cases_systems.vae", system=system, preset=preset, video=VIDEO), reached)


def assert_reached(calls: dict[str, int], reached: set[str]) -> None:
    missing = [name for name in reached if not calls.get(f"npu::{name}")]
    assert not missing, f"{missing} of {calls}"
