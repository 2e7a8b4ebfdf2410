# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from vidgen.config import ConfigError
from vidgen.models.autoencoders import WFVAE
from vidgen.models.opensora_plan_v1_5 import SparseUMMDiT
from vidgen.pipelines.folders import Parts, find_parts, weights_folder, write_parts
from vidgen.pipelines.text_to_video import SampleSettings, describe_sample, read_prompts, sample_videos

SMALL = {"steps": 2, "frames": 9, "height": 32, "width": 48, "fps": 8.0, "device": "cpu"}


def test_sample_writes_a_playable_video_with_its_facts(model_folder, tmp_path):
    (result,) = sample_videos(model_folder, ["A man, talking!"], tmp_path, SampleSettings(seed=3, **SMALL))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_a_man_talking.json",
        "000_a_man_talking.mp4",
        "000_a_man_talking.png",
    ]
    with av.open(result["video"]) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, float(stream.average_rate)) == (32, 48, 8.0)
        assert sum(1 for _ in container.decode(stream)) == 9
    content = (tmp_path / "000_a_man_talking.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # faststart
    facts = json.loads((tmp_path / "000_a_man_talking.json").read_text())
    assert facts["prompt"] == "A man, talking!" and facts["seed"] == 3
    assert facts["settings"]["steps"] == 2 and facts["settings"]["guidance"] == 8.0
    assert facts["versions"]["torch"] == torch.__version__ and len(facts["model_config_sha256"]) == 64
    with Image.open(result["sheet"]) as sheet:
        assert sheet.width > 9 * 48


def pixels(result) -> torch.Tensor:
    """What is below the label of the sheet: frames before they were encoded, which x264 does not always do alike."""
    with Image.open(result["sheet"]) as sheet:
        values = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
        return values.view(sheet.height, sheet.width, 3)[20:]


def test_seeds_belong_to_prompts_not_to_calls(model_folder, tmp_path):
    settings = SampleSettings(seed=5, **SMALL)
    both = sample_videos(model_folder, ["a cat", "a dog"], tmp_path / "both", settings)
    alone = sample_videos(model_folder, ["a dog"], tmp_path / "alone", SampleSettings(seed=6, **SMALL))
    assert [result["seed"] for result in both] == [5, 6]
    assert torch.equal(pixels(both[1]), pixels(alone[0]))
    assert not torch.equal(pixels(both[0]), pixels(alone[0]))


def test_prompt_and_guidance_matter(model_folder, tmp_path):
    def sampled(prompt, **changes):
        settings = SampleSettings(**{**SMALL, "guidance": 30.0, "guidance_rescale": 0.0, **changes})
        (result,) = sample_videos(model_folder, [prompt], tmp_path, settings)
        return pixels(result)

    first = sampled("a man talks in a car")
    assert torch.equal(first, sampled("a man talks in a car"))
    assert not torch.equal(first, sampled("birds over the sea at night"))
    assert not torch.equal(first, sampled("a man talks in a car", guidance=1.0))


def test_bf16(model_folder, tmp_path):
    sample_videos(model_folder, ["a cat"], tmp_path, SampleSettings(precision="bf16", **SMALL))


def test_the_release_prefix_is_used_unless_the_model_says_otherwise(model_folder, tmp_path):
    parts = find_parts(model_folder)
    assert parts.prompt_prefix == "high quality, " and (parts.num_frames, parts.height, parts.width) == (121, 576, 1024)
    assert describe_sample(model_folder, SampleSettings())["latent_frames_height_width"] == [16, 72, 128]


BAD = {
    "frames": ({"frames": 10}, "frames must be 8n\\+1"),
    "height": ({"height": 24}, "height must be a multiple of 16"),
    "steps": ({"steps": 0}, "steps must be positive"),
    "rescale": ({"guidance_rescale": 2.0}, "guidance_rescale"),
    "device": ({"device": "tpu"}, "device: wanted one of"),
    "precision": ({"precision": "fp8"}, "precision: wanted"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(model_folder, tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        sample_videos(model_folder, ["a cat"], tmp_path, SampleSettings(**{**SMALL, **changes}))
    assert not list(tmp_path.iterdir())


def test_no_prompts(model_folder, tmp_path):
    with pytest.raises(ValueError, match="no prompt"):
        sample_videos(model_folder, [], tmp_path, SampleSettings(**SMALL))
    (tmp_path / "prompts.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text(" a cat \n\nein Hund läuft\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "ein Hund läuft"]


# Folders


def test_parts_are_written_relative_so_that_a_tree_can_move(model_folder, tmp_path):
    run = tmp_path / "old" / "run"
    run.mkdir(parents=True)
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        (tmp_path / "old" / name).symlink_to(model_folder / name)
    place = tmp_path / "old"
    parts = Parts(Path("ema"), place / "vae", place / "text_encoder", place / "text_encoder_2", num_frames=9)
    write_parts(parts, run)
    assert "/old/" not in (run / "pipeline.json").read_text()
    (tmp_path / "old").rename(tmp_path / "new")
    found = find_parts(tmp_path / "new" / "run")
    assert found.transformer == tmp_path / "new" / "run" / "ema" and found.num_frames == 9
    assert found.t5 == tmp_path / "new" / "text_encoder"


def test_missing_parts_are_named(model_folder, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        find_parts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_parts(tmp_path)
    with pytest.raises(ValueError, match="where its vae lies; give --vae FOLDER"):
        find_parts(model_folder / "transformer")
    with pytest.raises(ValueError, match="does not exist; give --t5"):
        find_parts(model_folder, t5=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no model there"):
        weights_folder(tmp_path)


def test_unknown_names_in_pipeline_json(tmp_path):
    (tmp_path / "pipeline.json").write_text('{"transformer": "ema", "vea": "x"}')
    with pytest.raises(ConfigError, match="did you mean vae"):
        find_parts(tmp_path)


def test_weights_of_another_model_are_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match="describes a WFVAE, wanted a SparseUMMDiT"):
        SparseUMMDiT.from_pretrained(model_folder / "vae")
    assert weights_folder(model_folder / "vae") == model_folder / "vae"
    assert WFVAE.from_pretrained(weights_folder(model_folder / "vae")).config.latent_dim == 4
