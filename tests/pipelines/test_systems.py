# SPDX-License-Identifier: Apache-2.0
"""Every system and task: from a model folder in the real layout to mp4, sheet and json."""

import json
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from vidgen.pipelines import text_to_video
from vidgen.pipelines.text_to_video import Request, SampleSettings, describe_sample, sample_videos

CASES = {
    # model, settings, references by name, frames
    "1.3 t2v": ("opensora_plan_v1_3", "tiny", {}, (), 9),
    "1.3 nothing given": ("opensora_plan_v1_3", "tiny_i2v", {}, (), 9),
    "1.3 i2v": ("opensora_plan_v1_3", "tiny_i2v", {}, ("red",), 9),
    "1.3 transition": ("opensora_plan_v1_3", "tiny_i2v", {"noise_strength": 0.1}, ("red", "blue"), 9),
    "1.3 continuation": ("opensora_plan_v1_3", "tiny_i2v", {}, ("man",), 9),
    "1.3 random": ("opensora_plan_v1_3", "tiny_i2v", {"condition": "random_temporal"}, ("man",), 9),
    "1.3 clear": ("opensora_plan_v1_3", "tiny_i2v", {"condition": "clear"}, ("man",), 9),
    "1.5 t2v": ("opensora_plan_v1_5", "tiny", {}, (), 9),
    "2.0 t2v": ("opensora_v2", "tiny_i2v", {}, (), 9),
    "2.0 t2v without condition": ("opensora_v2", "tiny", {}, (), 9),
    "2.0 head": ("opensora_v2", "tiny_i2v", {}, ("red",), 9),
    "2.0 tail": ("opensora_v2", "tiny_i2v", {"condition": "i2v_tail"}, ("red",), 9),
    "2.0 loop": ("opensora_v2", "tiny_i2v", {}, ("red", "blue"), 9),
    "2.0 v2v head": ("opensora_v2", "tiny_i2v", {"steps": 1}, ("man",), 37),
    "2.0 v2v tail": ("opensora_v2", "tiny_i2v", {"steps": 1, "condition": "v2v_tail"}, ("man",), 37),
    "2B": ("cogvideox", "tiny-2b", {}, (), 9),
    "5B": ("cogvideox", "tiny-5b", {}, (), 9),
    "5B ddim": ("cogvideox", "tiny-5b", {"sampler": "ddim", "zero_negative": True}, (), 17),
    "5B-I2V": ("cogvideox", "tiny-5b-i2v", {"height": 48, "width": 80}, ("red",), 9),
    "1.5-5B": ("cogvideox", "tiny-1.5", {}, (), 17),
    "1.5-5B-I2V": ("cogvideox", "tiny-1.5-i2v", {}, ("red",), 17),
}
SMALL = {"steps": 2, "height": 32, "width": 48, "fps": 8.0, "device": "cpu"}


def frames(path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


@pytest.fixture
def files(images, real_clip) -> dict[str, Path]:
    return {"red": images[0], "blue": images[1], "man": real_clip}


@pytest.mark.parametrize("name", CASES)
def test_prompt_to_video(make_model, files, tmp_path, name):
    system, preset, changes, references, count = CASES[name]
    settings = SampleSettings(**{**SMALL, "seed": 3, "frames": count, **changes})
    request = Request("A man, talking!", tuple(files[reference] for reference in references))
    (result,) = sample_videos(make_model(system, preset), [request], tmp_path, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"000_a_man_talking.{suffix}" for suffix in ("json", "mp4", "png")
    ]
    written = frames(result["video"])
    assert written.shape == (count, settings.height, settings.width, 3)
    assert len(written.unique()) > 20  # something is to be seen
    facts = json.loads(Path(result["json"]).read_text())
    assert facts["system"] == system and facts["seed"] == 3 and facts["settings"]["steps"] == settings.steps
    assert facts["references"] == [str(files[reference]) for reference in references]
    with Image.open(result["sheet"]) as sheet:
        assert sheet.width > min(count, 8) * settings.width
