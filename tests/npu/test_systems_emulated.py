# SPDX-License-Identifier: Apache-2.0
"""Verification rung 4: the four systems at tiny size on the emulated device equal the CPU."""

import pytest

from .worker import Worker

VIDEO = (9, 32, 48)
PRESETS = [
    ("opensora_plan_v1_3", "tiny"),
    ("opensora_plan_v1_3", "tiny_i2v"),
    ("opensora_plan_v1_5", "tiny"),
    ("opensora_v2", "tiny"),
    ("opensora_v2", "tiny_i2v"),
    ("cogvideox", "tiny-2b"),
    ("cogvideox", "tiny-5b"),
    ("cogvideox", "tiny-5b-i2v"),
    ("cogvideox", "tiny-1.5"),
    ("cogvideox", "tiny-1.5-i2v"),
]
AUTOENCODERS = [
    ("opensora_plan_v1_3", "small"),  # norms over the few channels of the tiny one enlarge every rounding
    ("opensora_plan_v1_5", "small"),
    ("opensora_v2", "tiny"),
    ("cogvideox", "tiny"),
]


@pytest.mark.parametrize("system, preset", PRESETS)
def test_forward_backward_and_three_steps(npu: Worker, system: str, preset: str) -> None:
    video = (9, 48, 80) if preset == "tiny-5b-i2v" else VIDEO  # its positions are learned for this size
    npu.run("cases_systems.transformer", system=system, preset=preset, video=video)


@pytest.mark.parametrize("system, preset", AUTOENCODERS)
def test_autoencoder(npu: Worker, system: str, preset: str) -> None:
    npu.run("cases_systems.vae", system=system, preset=preset, video=VIDEO)
