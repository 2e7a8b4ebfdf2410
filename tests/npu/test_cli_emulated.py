# SPDX-License-Identifier: Apache-2.0
"""Verification rung 4: the command line with ``device: npu`` on the emulated device."""

from pathlib import Path

import pytest

from .worker import Worker

SLOW = pytest.mark.slow


@pytest.mark.parametrize("system", ["opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox"])
def test_train_resume_sample(npu: Worker, tmp_path: Path, system: str) -> None:
    npu.run("cases_cli.train_resume_sample", system=system, folder=str(tmp_path))


@pytest.mark.parametrize(
    "system", ["opensora_v2", *(pytest.param(s, marks=SLOW) for s in ("opensora_plan_v1_3", "cogvideox"))]
)
def test_image_to_video(npu: Worker, tmp_path: Path, system: str) -> None:
    npu.run("cases_cli.image_to_video", system=system, folder=str(tmp_path))


def test_autoencoder(npu: Worker, tmp_path: Path) -> None:
    npu.run("cases_cli.autoencoder", folder=str(tmp_path))


@pytest.mark.parametrize("system", ["opensora_plan_v1_5", pytest.param("cogvideox", marks=SLOW)])
def test_bfloat16_with_the_profiler(npu: Worker, tmp_path: Path, system: str) -> None:
    npu.run("cases_cli.bfloat16", system=system, folder=str(tmp_path))


def test_environment_report(npu: Worker) -> None:
    npu.run("cases_cli.environment_report")
