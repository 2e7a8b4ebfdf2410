# SPDX-License-Identifier: Apache-2.0
"""Every system and task: from a model folder in the real layout to mp4, sheet and json."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from vidgen.data.video import open_video, write_video
from vidgen.models import opensora_v2
from vidgen.pipelines import text_to_video
from vidgen.pipelines.text_to_video import Request, SampleSettings, describe_sample, sample_videos

CASES = {
    # model, settings, references by name, frames
    "1.3 t2v": ("opensora_plan_v1_3", "tiny", {}, (), 9),
    "1.3 nothing given": ("opensora_plan_v1_3", "tiny_i2v", {}, (), 9),
    "1.3 i2v": ("opensora_plan_v1_3", "tiny_i2v", {}, ("red",), 9),
    "1.3 transition": ("opensora_plan_v1_3", "tiny_i2v", {"noise_strength": 0.1}, ("red", "blue"), 9),
    "1.3 continuation": ("opensora_plan_v1_3", "tiny_i2v", {}, ("short",), 9),
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


def pixels(result) -> torch.Tensor:
    """What is below the label of the sheet: frames before they were encoded, which x264 does not always do alike."""
    with Image.open(result["sheet"]) as sheet:
        values = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
        return values.view(sheet.height, sheet.width, 3)[20:]


@pytest.fixture
def files(images, real_clip, tmp_path_factory) -> dict[str, Path]:
    short = tmp_path_factory.mktemp("short") / "short.mp4"  # five frames of the man
    with open_video(real_clip) as reader:
        write_video(short, reader.frames(range(5)), 8.0)
    return {"red": images[0], "blue": images[1], "man": real_clip, "short": short}


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


@pytest.mark.parametrize("name", ["1.3 i2v", "2.0 head", "1.5-5B-I2V", "2B"])
def test_bf16(make_model, files, tmp_path, name):
    system, preset, changes, references, count = CASES[name]
    settings = SampleSettings(**{**SMALL, "frames": count, "precision": "bf16", **changes})
    request = Request("a man", tuple(files[reference] for reference in references))
    (result,) = sample_videos(make_model(system, preset), [request], tmp_path, settings)
    assert frames(result["video"]).shape[0] == count


# Seeds and batches


BATCHES = {
    "1.3": ("opensora_plan_v1_3", "tiny_i2v", {"guidance": 3.0}),  # fresh noise at every step
    "1.5": ("opensora_plan_v1_5", "tiny", {"guidance": 3.0}),
    "2.0": ("opensora_v2", "tiny_i2v", {"guidance": 3.0}),
    "5B": ("cogvideox", "tiny-5b", {"guidance": 3.0, "steps": 3}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_video_does_not_depend_on_its_batch(make_model, files, monkeypatch, tmp_path, name):
    system, preset, changes = BATCHES[name]
    latents: list[torch.Tensor] = []
    original = text_to_video.sample_all

    def sample_all(*arguments):
        result = original(*arguments)
        latents.extend(result[0])
        return result

    monkeypatch.setattr(text_to_video, "sample_all", sample_all)
    model, settings = make_model(system, preset), SampleSettings(**{**SMALL, "frames": 9, "seed": 5, **changes})
    image = (files["red"],) if preset == "tiny_i2v" else ()
    requests = [Request("a cat", image), Request("a dog"), Request("birds at night")]
    sample_videos(model, requests, tmp_path / "three", replace(settings, batch_size=3))
    sample_videos(model, requests[2:], tmp_path / "alone", replace(settings, seed=7))
    torch.testing.assert_close(latents[2], latents[3], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(latents[1], latents[2], atol=1e-2)
    sample_videos(model, requests[2:], tmp_path / "other", replace(settings, seed=8))
    assert not torch.allclose(latents[4], latents[2], atol=1e-2)


@pytest.mark.parametrize("name", ["1.3 i2v", "2.0 head", "1.5-5B-I2V"])
def test_the_image_matters(make_model, files, tmp_path, name):
    system, preset, changes, _, count = CASES[name]
    settings = SampleSettings(**{**SMALL, "frames": count, **changes})
    requests = [Request("a man", (files[image],)) for image in ("red", "blue")]
    written = []
    for request in requests:  # with the same seed
        (result,) = sample_videos(make_model(system, preset), [request], tmp_path, settings)
        written.append(pixels(result).float())
    assert (written[0] - written[1]).abs().mean() > 1


@pytest.mark.parametrize(
    "name, changes",
    [
        ("5B", {"sampler": "ddim"}),
        ("5B", {"dynamic_guidance": False}),
        ("5B", {"shift": 3.0}),
        ("5B", {"guidance": 1.0}),
        ("5B", {"zero_negative": True}),
        ("2.0 head", {"image_guidance": 9.0}),
        ("2.0 head", {"temporal_oscillation": False}),
        ("2.0 t2v", {"shift": 9.0}),
        ("1.3 t2v", {"negative_prompt": "a horse"}),
        ("1.3 i2v", {"noise_strength": 1.0}),
    ],
)
def test_the_setting_matters(make_model, files, tmp_path, name, changes):
    system, preset, own, references, count = CASES[name]
    request = Request("a man", tuple(files[reference] for reference in references))
    written = []
    for more in ({}, changes):
        settings = SampleSettings(**{**SMALL, "frames": count, "steps": 3, **own, **more})
        (result,) = sample_videos(make_model(system, preset), [request], tmp_path, settings)
        written.append(pixels(result))
    assert not torch.equal(*written)


# What does not fit


BAD = {
    "no image": ("cogvideox", "tiny-1.5-i2v", {}, (), "needs one image for 'x'"),
    "a video for an image": ("cogvideox", "tiny-1.5-i2v", {}, ("man",), "needs one image"),
    "image for text-to-video": ("cogvideox", "tiny-5b", {}, ("red",), "takes no images"),
    "frames in pairs": ("cogvideox", "tiny-5b", {"frames": 13}, (), "frames must be 8n\\+1, got 13"),
    "size of patches": ("cogvideox", "tiny-5b", {"height": 40}, (), "height must be a multiple of 16, got 40"),
    "learned size": ("cogvideox", "tiny-5b-i2v", {}, ("red",), "positions are learned: wanted 48 x 80"),
    "sampler": ("cogvideox", "tiny-5b", {"sampler": "euler"}, (), "sampler must be one of ddim, dpm"),
    "foreign setting": ("cogvideox", "tiny-5b", {"image_guidance": 2.0}, (), "has no setting image_guidance"),
    "1.5 with image": ("opensora_plan_v1_5", "tiny", {}, ("red",), "takes no images"),
    "1.3 frames": ("opensora_plan_v1_3", "tiny", {"frames": 10}, (), "frames must be 4n\\+1, got 10"),
    "1.3 t2v with image": ("opensora_plan_v1_3", "tiny", {}, ("red",), "text-to-video model takes no images"),
    "1.3 condition": ("opensora_plan_v1_3", "tiny_i2v", {"condition": "loop"}, (), "condition must be one of t2iv"),
    "1.3 transition": (
        "opensora_plan_v1_3",
        "tiny_i2v",
        {"condition": "transition"},
        ("red",),
        "needs 2 images, got 1",
    ),
    "1.3 continuation": ("opensora_plan_v1_3", "tiny_i2v", {"condition": "continuation"}, ("red",), "needs one video"),
    "2.0 condition": ("opensora_v2", "tiny_i2v", {"condition": "i2v"}, ("red",), "condition must be one of t2v"),
    "2.0 missing": ("opensora_v2", "tiny_i2v", {"condition": "i2v_head"}, (), "needs one reference, got 0"),
    "2.0 image as video": ("opensora_v2", "tiny_i2v", {"condition": "v2v_head"}, ("red",), "needs a video"),
    "2.0 short": ("opensora_v2", "tiny_i2v", {"condition": "v2v_head"}, ("man",), "wanted more frames"),
    "2.0 without cond_embed": ("opensora_v2", "tiny", {}, ("red",), "no cond_embed"),
    "tiles in time": ("opensora_v2", "tiny", {"tile_frames": 4}, (), "tile_frames: .* line up"),
    "tiles in space": ("cogvideox", "tiny-5b", {"tile_size": 20}, (), "tile_size must be a multiple of 8, got 20"),
    "steps": ("opensora_v2", "tiny", {"steps": 0}, (), "steps must be positive"),
    "batch": ("opensora_v2", "tiny", {"batch_size": 0}, (), "batch_size must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(make_model, files, tmp_path, name):
    system, preset, changes, references, message = BAD[name]
    request = Request("x", tuple(files[reference] for reference in references))
    with pytest.raises(ValueError, match=message):
        sample_videos(
            make_model(system, preset), [request], tmp_path, SampleSettings(**{**SMALL, "frames": 9, **changes})
        )
    assert not list(tmp_path.iterdir())


def test_videos_that_are_too_long_or_too_short(make_model, files, tmp_path):
    model, requests = make_model("opensora_plan_v1_3", "tiny_i2v"), [Request("x", (files["short"],))]
    settings = SampleSettings(**{**SMALL, "frames": 5})
    with pytest.raises(ValueError, match="short.mp4 has 5 frames at 8 per second, which leaves nothing of 5"):
        sample_videos(model, requests, tmp_path, settings)
    with pytest.raises(ValueError, match="clear needs a video of 9 frames, .*short.mp4 has 5"):
        sample_videos(model, requests, tmp_path, replace(settings, frames=9, condition="clear"))


def test_missing_and_broken_references(make_model, tmp_path):
    model, settings = make_model("opensora_v2", "tiny_i2v"), SampleSettings(**{**SMALL, "frames": 9})
    with pytest.raises(ValueError, match="there is no file .*nothing.png"):
        sample_videos(model, [Request("x", (tmp_path / "nothing.png",))], tmp_path, settings)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png: not a readable image"):
        sample_videos(model, [Request("x", (tmp_path / "broken.png",))], tmp_path, settings)


# Facts without weights


RELEASED = {
    "opensora_plan_v1_3": ("tiny", [93, 352, 640], [24, 44, 80], 16.0),
    "opensora_plan_v1_5": ("tiny", [121, 576, 1024], [16, 72, 128], 24.0),
    "opensora_v2": ("tiny", [129, 192, 336], [33, 24, 42], 24.0),
    "cogvideox": ("tiny-1.5", [81, 768, 1360], [22, 96, 170], 16.0),
}


@pytest.mark.parametrize("system", RELEASED)
def test_dry_run_tells_the_released_sizes(make_model, system):
    preset, video, latent, fps = RELEASED[system]
    facts = describe_sample(make_model(system, preset), SampleSettings(device="cpu"), ["a cat"])
    assert facts["system"] == system and facts["videos"] == 1
    assert facts["video_shape"] == [3, *video] and facts["latent_frames_height_width"] == latent
    assert facts["fps"] == fps and ("clip" in facts) == (system in ("opensora_plan_v1_5", "opensora_v2"))


def test_an_image_model_makes_the_first_frame(make_model, tmp_path):
    """The layout of FLUX.1-dev: guidance is an input."""
    folder = tmp_path / "image_model"
    shutil.copytree(make_model("opensora_v2", "tiny"), folder)
    torch.manual_seed(1)
    config = opensora_v2.preset("tiny", guidance_embed=True, fused_qkv=True, use_liger_rope=False)
    opensora_v2.MMDiT(config).save_pretrained(folder / "transformer")
    settings = SampleSettings(**{**SMALL, "frames": 9, "image_model": folder})
    (result,) = sample_videos(make_model("opensora_v2", "tiny_i2v"), ["a cat"], tmp_path / "out", settings)
    with Image.open(tmp_path / "out" / "000_a_cat_image.png") as image:
        assert image.size == (48, 32) and len(image.getcolors(5000)) > 20
    assert result["references"] == [str(tmp_path / "out" / "000_a_cat_image.png")]


def test_refined_prompts_are_what_is_encoded(make_model, monkeypatch, tmp_path):
    class Refiner:
        @classmethod
        def from_pretrained(cls, folder, dtype):
            assert folder == tmp_path / "refiner"
            return cls()

        def to(self, device):
            return self

        def refine(self, prompt):
            return f"{prompt} in the rain"

    monkeypatch.setattr(text_to_video, "PromptRefiner", Refiner)
    model, settings = make_model("opensora_plan_v1_3"), SampleSettings(**{**SMALL, "frames": 9})
    (refined,) = sample_videos(model, ["a cat"], tmp_path / "a", replace(settings, refiner=tmp_path / "refiner"))
    (whole,) = sample_videos(model, ["a cat in the rain"], tmp_path / "b", settings)
    (short,) = sample_videos(model, ["a cat"], tmp_path / "c", settings)
    assert refined["refined_prompt"] == "a cat in the rain" and refined["prompt"] == "a cat"
    assert torch.equal(pixels(refined), pixels(whole))
    assert not torch.equal(pixels(refined), pixels(short))


def test_class_that_is_not_known(make_model, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="wanted _class_name OpenSoraT2V_v1_3.*got 'FluxTransformer2DModel'"):
        describe_sample(tmp_path, SampleSettings())


def test_command_line_with_prompt_and_image_files(make_model, files, tmp_path, monkeypatch, capsys):
    from vidgen import cli

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "images.txt").write_text(f"{files['red']}\n{files['red']},{files['blue']}\n")
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--model", str(make_model("opensora_v2", "tiny_i2v")), "--prompt-file", "prompts.txt"]
    command += ["--image-file", "images.txt", "--frames", "9", "--height", "32", "--width", "48", "--steps", "1"]
    command += ["--batch-size", "2", "--oscillation", "image", "--tile-size", "32", "--tile-frames", "16"]
    assert cli.main([*command, "--dry-run"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["videos"] == 2 and facts["settings"]["text_oscillation"] is False
    assert facts["settings"]["image_oscillation"] is True
    assert cli.main(command) == 0
    assert [path.name for path in sorted(Path("outputs").glob("*.mp4"))] == ["000_a_cat.mp4", "001_a_dog.mp4"]
    assert len(json.loads(Path("outputs/001_a_dog.json").read_text())["references"]) == 2
    assert cli.main([*command, "--image", "x.png"]) == 2
    assert "given in 2 ways" in capsys.readouterr().err
    assert cli.main([*command, "--oscillation", "sound"]) == 2
    assert "some of text, image, temporal, or none, got sound" in capsys.readouterr().err


def test_tokenizer_and_scheduler_in_folders_of_their_own(make_model, tmp_path):
    """As diffusers lays a model out; its scheduler says by how much the signal-to-noise ratio is divided."""
    folder = tmp_path / "model"
    shutil.copytree(make_model("cogvideox", "tiny-5b"), folder)
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "text_encoder" / name).rename(folder / "tokenizer" / name)
    settings = SampleSettings(**{**SMALL, "frames": 9})

    def sampled(name: str, **changes) -> torch.Tensor:
        (result,) = sample_videos(folder, ["a cat"], tmp_path / name, replace(settings, **changes))
        return pixels(result)

    without, shifted = sampled("without"), sampled("shifted", shift=3.0)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"snr_shift_scale": 3.0}')
    assert torch.equal(sampled("scheduler"), shifted) and not torch.equal(without, shifted)


def test_one_model_at_a_time(make_model, files, monkeypatch, tmp_path):
    """Encoders, VAE and transformer are gone when the next of them is loaded."""
    system = text_to_video.SYSTEMS["opensora_v2"]
    alive: list[weakref.ref] = []
    order = []

    def watched(name):
        original = getattr(system, name)

        def load(*arguments):
            gc.collect()
            assert [model() for model in alive if model() is not None] == [], name
            loaded = original(*arguments)
            order.append(name)
            alive.extend(weakref.ref(model) for model in (loaded if isinstance(loaded, tuple) else (loaded,)))
            return loaded

        return load

    for name in ("load_encoders", "load_vae", "load_transformer"):
        monkeypatch.setattr(system, name, watched(name))
    request = Request("a cat", (files["red"],))
    settings = SampleSettings(**{**SMALL, "frames": 9})
    sample_videos(make_model("opensora_v2", "tiny_i2v"), [request], tmp_path, settings)
    assert order == ["load_encoders", "load_vae", "load_transformer", "load_vae"]


@pytest.mark.parametrize("name", ["2.0 head", "2.0 loop", "2.0 tail"])
def test_given_frames_come_back(make_model, files, monkeypatch, tmp_path, name):
    """The latent of a given frame is in the sampled latent, and nowhere else."""
    system, preset, changes, references, count = CASES[name]
    seen = {}
    for function in ("encode_references", "sample_all"):
        original = getattr(text_to_video, function)

        def noted(*arguments, original=original, function=function):
            seen[function] = original(*arguments)
            return seen[function]

        monkeypatch.setattr(text_to_video, function, noted)
    request = Request("a man", tuple(files[reference] for reference in references))
    settings = SampleSettings(**{**SMALL, "frames": count, **changes})
    sample_videos(make_model(system, preset), [request], tmp_path, settings)
    given, latent = seen["encode_references"][0], seen["sample_all"][0][0]
    places = {"2.0 head": [0], "2.0 tail": [2], "2.0 loop": [0, 2]}[name]
    for place in range(3):
        assert torch.equal(latent[:, :, place], given["masked_latent"][:, :, place]) == (place in places)


GIVEN = {"1.3 i2v": [0], "1.3 transition": [0, 8], "1.3 continuation": [*range(5)], "1.3 clear": [*range(9)]}


@pytest.mark.parametrize("name", GIVEN)
def test_frames_that_version_1_3_is_given(make_model, files, name):
    system, preset, changes, references, count = CASES[name]
    request = Request("a man", tuple(files[reference] for reference in references))
    settings = SampleSettings(**{**SMALL, "frames": count, **changes})
    job = text_to_video.plan(make_model(system, preset), settings, [request])
    video, mask = text_to_video.SYSTEMS[system].given_video(job, request, torch.Generator())
    assert video.shape == (1, 3, count, 32, 48) and mask.shape == (1, 1, count, 1, 1)
    assert [place for place in range(count) if mask[0, 0, place] == 0] == GIVEN[name]
    black = (video == -1).all(1).flatten(2).all(2)[0]
    assert [place for place in range(count) if not black[place]] == GIVEN[name]


@pytest.mark.parametrize("name", ["1.3 i2v", "1.3 transition", "1.3 continuation", "1.3 random", "1.3 clear"])
def test_frames_to_generate_are_hidden_from_the_inpainting_model(make_model, files, name):
    from vidgen.pipelines import opensora_plan_v1_3

    system, preset, changes, references, count = CASES[name]
    request = Request("a man", tuple(files[reference] for reference in references))
    settings = SampleSettings(**{**SMALL, "frames": count, **changes})
    job = text_to_video.plan(make_model(system, preset), settings, [request])
    video, mask = opensora_plan_v1_3.given_video(job, request, torch.Generator().manual_seed(1))
    hidden = mask.flatten().bool()
    assert (video[:, :, hidden] == -1).all()
    assert (video[:, :, ~hidden] > -1).any() and bool(hidden.any()) == (name != "1.3 clear")
