# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest
import torch
from torch import nn

from vidgen import device as devices
from vidgen import ops
from vidgen.io import read_json
from vidgen.train.loop import train
from vidgen.train.profile import FlopCount, StepProfiler


def test_a_run_is_traced(make_recipe):
    recipe = make_recipe("dit", training={"steps": 5, "checkpoint_every": 5})
    train(recipe, profile_steps=2)
    folder = recipe.output / "profile"
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert {"vidgen::adaln_modulate", "vidgen::attention", "aten::mm"} <= names
    steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep") and event.get("dur")]
    assert len(set(steps)) == 2
    summary = read_json(folder / "summary.json")
    assert summary["steps"] == [3, 4] and summary["seconds_per_step"] > 0
    assert summary["flops_per_step"] > 1e6 and summary["flops_not_counted"] == [] and summary["mfu"] is None
    assert "vidgen::adaln_modulate" in (folder / "ops.txt").read_text()
    assert "ui.perfetto.dev" in (folder / "README.md").read_text()


def test_profiling_changes_nothing(make_recipe, tmp_path):
    plain = train(make_recipe(training={"steps": 4}))
    traced = train(make_recipe(output=tmp_path / "traced", training={"steps": 4}), profile_steps=1)
    assert plain["loss_last"] == traced["loss_last"]


def test_too_short_a_run_is_refused(make_recipe):
    with pytest.raises(ValueError, match="--profile: 5 steps need 7 to be left, there are 6"):
        train(make_recipe(), profile_steps=5)
    with pytest.raises(ValueError, match="--profile: -1 steps need 3"):
        train(make_recipe(), profile_steps=-1)


def test_an_interrupted_run_leaves_no_summary(tmp_path):
    profiler = StepProfiler(torch.device("cpu"), tmp_path / "p", 3, 9, recomputes=False)
    with profiler.step():
        pass
    profiler.note(1, 0.1)
    profiler.close()
    assert not list((tmp_path / "p").glob("*.json"))
    assert not torch.autograd._profiler_enabled()


def test_mfu_needs_a_peak_and_a_sound_count(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "peak_flops", lambda device: (1e12, "a datasheet"))
    profiler = StepProfiler(torch.device("cpu"), tmp_path, 1, 9, recomputes=False)
    profiler.flops.total, profiler.seconds = 10**11, 0.5
    assert profiler.summary(3)["mfu"] == pytest.approx(0.2)
    profiler.flops.unknown.add("npu::npu_fusion_attention")
    assert profiler.summary(3)["mfu"] is None
    profiler.flops.unknown.clear()
    profiler.recomputes = True
    assert profiler.summary(3)["mfu"] is None


def test_arithmetic_is_counted():
    tokens, channels, heads = 32, 64, 4
    linear = nn.Linear(channels, channels, bias=False)
    x = torch.randn(1, tokens, channels, requires_grad=True)
    with FlopCount() as count:
        y = linear(x)
        forward = count.total
        y.sum().backward()
    assert forward == 2 * tokens * channels**2 and count.total == 3 * forward
    q = torch.randn(1, tokens, heads, 16, requires_grad=True)
    with FlopCount() as count:
        out = ops.attention(q, q, q)
        assert count.total == 4 * heads * tokens**2 * 16
        out.sum().backward()
    assert count.total == 14 * heads * tokens**2 * 16  # 2 products forward, 5 backward
    with FlopCount() as count:
        ops.attention_lse(q, q, q)
    assert count.total == 4 * heads * tokens**2 * 16


def test_operators_of_other_libraries_are_named():
    library = torch.library.Library("profile_test", "DEF")
    library.define("strange(Tensor x) -> Tensor")
    library.impl("strange", lambda x: x + 1, "CPU")
    with FlopCount() as count:
        torch.ops.profile_test.strange(torch.ones(2))
    assert count.unknown == {"profile_test::strange"}
