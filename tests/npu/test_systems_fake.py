# SPDX-License-Identifier: Apache-2.0
"""Verification rung 3: released models at real sizes, with fake tensors on npu, have the shapes that the CPU's have."""

from typing import Any

import pytest

from .worker import Worker

VIDEO = (121, 576, 1024)
TRANSFORMERS = {
    # preset, parameters, video, whether gradients too
    "opensora_plan_v1_3": [
        ("released", 2_771_981_600, (93, 352, 640), False),
        ("released_i2v", 2_782_713_632, VIDEO, True),
    ],
    "opensora_plan_v1_5": [("released", 8_504_661_120, VIDEO, True)],
    "opensora_v2": [
        ("released", 11_891_390_528, VIDEO, True),
        ("released", 11_891_390_528, (129, 768, 768), False),
    ],
    "cogvideox": [
        ("2b", 1_693_783_872, (49, 480, 720), False),
        ("5b", 5_570_283_072, VIDEO, False),
        ("5b-i2v", 5_625_087_552, (49, 480, 720), False),
        ("1.5-5b", 5_570_676_352, VIDEO, True),
        ("1.5-5b-i2v", 5_571_594_880, (81, 768, 1360), False),
    ],
}
# Forward alone, of models that others here are like.
SLOW = {("released", "93x352x640"), ("released", "129x768x768"), ("5b", "121x576x1024"), ("1.5-5b-i2v", "81x768x1360")}
# what of torch_npu each has to reach beside attention
ROTATED = {"npu::npu_rotary_mul"}
FUSED = {
    "opensora_plan_v1_3": ROTATED,
    "opensora_plan_v1_5": ROTATED | {"npu::npu_rms_norm"},
    "opensora_v2": ROTATED | {"npu::npu_rms_norm"},
    "cogvideox": ROTATED,
}


def case(system: str, *values: Any) -> Any:
    """Named by what is text or a size."""
    words = ["x".join(map(str, v)) if isinstance(v, tuple) else v for v in values if isinstance(v, (str, tuple))]
    marks = [pytest.mark.slow] if (words[0], words[-1]) in SLOW else []
    return pytest.param(system, *values, id="-".join([system, *words]), marks=marks)


@pytest.mark.parametrize(
    "system, preset, parameters, video, backward",
    [case(system, *values) for system, cases in TRANSFORMERS.items() for values in cases],
)
def test_transformer(npu: Worker, system: str, preset: str, parameters: int, video: tuple, backward: bool) -> None:
    found = npu.run("cases_fake.transformer", system=system, preset=preset, video=video, backward=backward)
    print(*found["shapes"], sep="\n")  # pytest -rP shows them
    assert found["parameters"] == parameters
    attentions = sum(found["vidgen"].get(name, 0) for name in ("attention", "skiparse_attention"))
    # one call of Ascend's attention for each of them, and none by way of PyTorch's
    assert found["npu"]["npu::npu_fusion_attention"] == attentions > 0, found
    assert found["npu"].get("npu::npu_fusion_attention_grad", 0) == attentions * backward, found
    assert preset == "2b" or found["npu"].keys() >= FUSED[system], found  # 2B does not rotate


@pytest.mark.parametrize(
    "system, video, encode",
    [
        case("opensora_plan_v1_3", VIDEO, True),
        case("opensora_plan_v1_5", VIDEO, True),
        case("opensora_v2", (129, 768, 768), False),  # its encoder's many tiles take as long again
        case("cogvideox", (81, 768, 1360), False),
    ],
)
def test_autoencoder(npu: Worker, system: str, video: tuple, encode: bool) -> None:
    found = npu.run("cases_fake.autoencoder", system=system, video=video, encode=encode)
    print(*found["shapes"], sep="\n")
    assert found["results"][0] == (1, 3, *video) and found["vidgen"]["causal_conv3d"] > 40


@pytest.mark.parametrize("system", TRANSFORMERS)
def test_autoencoder_gradients(npu: Worker, system: str) -> None:
    """At a size that such models are trained on."""
    found = npu.run("cases_fake.autoencoder_gradients", system=system, video=(17, 256, 256))
    assert found["results"] == [(1, 3, 17, 256, 256)]
    if not system.startswith("opensora_plan"):
        assert found["npu"]["npu::npu_group_norm_swish_grad"], found
