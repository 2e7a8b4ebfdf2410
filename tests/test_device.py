# SPDX-License-Identifier: Apache-2.0
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
