# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidgen import device


def test_cpu_and_auto():
    assert device.resolve("cpu") == torch.device("cpu")
    if not torch.cuda.is_available() and device.why_not("npu") is not None:
        assert device.resolve("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "auto:1", "", "CPU"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="device: wanted one of auto, cpu, cuda, npu"):
        device.resolve(name)


@pytest.mark.parametrize("name", ["cuda", "npu"])
def test_absent_devices_say_why(name):
    reason = device.why_not(name)
    if reason is None:
        pytest.skip(f"there is a {name} device")
    with pytest.raises(ValueError, match=f"'{name}' cannot be used here"):
        device.resolve(name)


def test_dtypes():
    assert device.compute_dtype(torch.device("cpu"), "bf16") == torch.bfloat16
    assert device.compute_dtype(torch.device("cpu"), "fp32") == torch.float32
    with pytest.raises(ValueError, match="precision: wanted one of fp32, bf16, got 'fp8'"):
        device.compute_dtype(torch.device("cpu"), "fp8")


def test_figures():
    cpu = torch.device("cpu")
    device.synchronize(cpu)
    assert 10 * 2**20 < device.peak_memory_bytes(cpu) < 2**42
    assert device.describe(cpu).startswith("cpu (")
    assert device.rng_state(cpu) is None


class Accelerator:
    """What torch.cuda and torch.npu answer."""

    def __init__(self, name: str, bf16: bool) -> None:
        self.name, self.bf16 = name, bf16

    def get_device_name(self, device):
        return self.name

    def is_bf16_supported(self, including_emulation):
        assert not including_emulation
        return self.bf16


def test_dtypes_of_accelerators(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(device, "_module", lambda kind: Accelerator("Tesla V100", bf16=False))
    with pytest.raises(ValueError, match="precision: Tesla V100 does not compute in bf16; use fp32"):
        device.compute_dtype(cuda, "bf16")
    assert device.why_not_dtype(cuda, torch.float64) is None
    assert device.why_not_dtype(cuda, torch.float8_e4m3fn) == "cuda does not compute in float8_e4m3fn"
    monkeypatch.setattr(device, "_module", lambda kind: Accelerator("NVIDIA H100 80GB HBM3", bf16=True))
    assert device.compute_dtype(cuda, "bf16") == torch.bfloat16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_of_the_program_alone():
    """Not of the one that started it."""
    child = "from vidgen import device; import torch; print(device.peak_memory_bytes(torch.device('cpu')))"
    parent = f"import subprocess, sys; b = b'1' * 2**31; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    found = subprocess.run([sys.executable, "-c", parent], env=environment, capture_output=True, text=True, check=True)
    assert 2**26 < int(found.stdout) < 2**30


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Ascend910B3", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks(monkeypatch, name, tflops):
    monkeypatch.setattr(device, "_module", lambda kind: Accelerator(name, bf16=True))
    found = device.peak_flops(torch.device("cuda"))
    assert (found and found[0]) == (tflops and tflops * 1e12)
    assert found is None or "datasheet" in found[1]
    assert device.peak_flops(torch.device("cpu")) is None


def test_communication():
    assert device.communication_backend(torch.device("cpu")) == "gloo"
    assert device.communication_backend(torch.device("cuda")) == "nccl"
    assert device.COMMUNICATION.keys() == set(device.KINDS)
