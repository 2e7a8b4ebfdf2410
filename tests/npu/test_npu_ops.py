# SPDX-License-Identifier: Apache-2.0
"""npu_torch on the emulated device (rung 4): values and gradients of every sample equal the reference on the CPU."""

import pytest

from vidgen import ops

from .worker import Worker

SERVED = [name for name, backends in ops.table("npu").items() if "npu_torch" in backends]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SERVED)
def test_samples(npu: Worker, name: str, dtype: str) -> None:
    found = npu.run("cases_ops.samples_equal", name=name, dtype=dtype)
    assert found["calls"] or name.endswith("layer_norm")
    # What is refused are the samples that have no elements.
    assert set(found["refused"]) <= {"a size is 0"} or all("got 0" in reason for reason in found["refused"])
    assert len(found["refused"]) < found["samples"] / 2


@pytest.mark.parametrize("name", SERVED)
def test_any_shape_and_stride(npu: Worker, name: str) -> None:
    assert npu.run("cases_ops.any_shape_and_stride", name=name, draws=30) >= 10


@pytest.mark.parametrize("case", ["tables_of_each_sample", "eps_is_passed_on"])
def test_what_samples_lack(npu: Worker, case: str) -> None:
    npu.run(f"cases_ops.{case}")


@pytest.mark.parametrize(
    "case",
    [
        "padded_text_is_packed",
        "mask_of_ones_costs_nothing",
        "nothing_seen_gives_zero",
        "masks_of_scores_are_passed_on",
        "more_sequences_than_fit_are_masked",
        "in_fake_mode",
        "ring_of_blocks",
        "merge_of_rows_that_saw_nothing",
        "gradient_of_rows_that_saw_nothing",
    ],
)
def test_attention(npu: Worker, case: str) -> None:
    npu.run(f"cases_ops.{case}")


@pytest.mark.parametrize(
    "pattern, text, masks, heads, batch, layout, folded",
    [
        ("single", 0, "", 3, 2, "BSND", 6),  # groups as heads
        ("single", 3, "", 3, 2, "BSND", 6),  # text queries in the same call
        ("single", 3, "text", 3, 2, "TND", 6),  # all groups see the same text
        ("single", 0, "", 129, 1, "BSND", 129),  # 258 heads are too many: groups as samples
        ("single", 0, "video", 3, 2, "TND", 3),  # each group sees other keys
        ("single", 3, "video text", 3, 2, "TND", 3),
        ("single", 0, "padding", 3, 2, "TND", 3),
        ("group", 0, "", 3, 2, "BSND", 3),
        ("group", 3, "", 3, 2, "BSND", 3),
        ("group", 3, "text", 3, 2, "TND", 3),
        ("group", 3, "video", 3, 2, "TND", 3),
        ("group", 3, "padding", 3, 2, "TND", 3),
    ],
)
def test_skiparse_is_one_call(
    npu: Worker, pattern: str, text: int, masks: str, heads: int, batch: int, layout: str, folded: int
) -> None:
    call = npu.run("cases_ops.skiparse_is_one_call", pattern=pattern, text=text, masks=masks, heads=heads, batch=batch)
    assert (call["input_layout"], call["head_num"], call["masked"]) == (layout, folded, False)
