# SPDX-License-Identifier: Apache-2.0
"""The whole of CogVideoX's pipelines against those of diffusers: same folder, same seeds, same latents."""

import warnings

import pytest
import torch

from vidgen.pipelines import cogvideox, text_to_video
from vidgen.pipelines.references import read_reference
from vidgen.pipelines.text_to_video import Request, SampleSettings, sample_videos

diffusers = pytest.importorskip("diffusers")

CASES = {
    "2B, DDIM": ("tiny-2b", {"height": 32, "width": 48, "shift": 3.0}, 9),
    "5B, DPM, dynamic guidance": ("tiny-5b", {"height": 32, "width": 48}, 17),
    "5B, DPM, plain guidance": ("tiny-5b", {"height": 48, "width": 32, "dynamic_guidance": False, "guidance": 4.0}, 9),
    "5B, DDIM, 7 steps": ("tiny-5b", {"height": 48, "width": 80, "sampler": "ddim", "steps": 7}, 9),
    "1.5-5B, DPM": ("tiny-1.5", {"height": 32, "width": 48, "steps": 7}, 17),
    "5B-I2V, DDIM": ("tiny-5b-i2v", {"height": 48, "width": 80, "sampler": "ddim"}, 9),
    "1.5-5B-I2V, DPM": ("tiny-1.5-i2v", {"height": 32, "width": 48}, 17),
}


def theirs(folder, settings, resolved, frames, image, text):
    """Latents by diffusers."""
    kinds = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    scheduler = kinds[resolved["sampler"]](
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=resolved["shift"],
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        set_alpha_to_one=True,
        clip_sample=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
        vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    cls = diffusers.CogVideoXPipeline if image is None else diffusers.CogVideoXImageToVideoPipeline
    pipe = cls(None, None, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=settings.height,
        width=settings.width,
        num_frames=frames,
        num_inference_steps=resolved["steps"],
        guidance_scale=resolved["guidance"],
        use_dynamic_cfg=resolved["dynamic"],
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="latent",
        **({} if image is None else {"image": image}),
    ).frames


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_diffusers(make_model, images, monkeypatch, tmp_path, name):
    preset, changes, frames = CASES[name]
    folder = make_model("cogvideox", preset)
    settings = SampleSettings(**{"seed": 4, "steps": 5, "frames": frames, "device": "cpu", **changes})
    image = images[0] if "I2V" in name else None
    ours: list[torch.Tensor] = []
    original = text_to_video.sample_all

    def sample_all(*arguments):
        result = original(*arguments)
        ours.extend(result[0])
        return result

    monkeypatch.setattr(text_to_video, "sample_all", sample_all)
    sample_videos(folder, [Request("a cat", () if image is None else (image,))], tmp_path / "out", settings)

    job = text_to_video.plan(folder, settings, [Request("a cat", () if image is None else (image,))])
    encoder = cogvideox.load_encoders(job.parts, job.dtype, job.device)
    text = [cogvideox.encode_text(encoder, words)["encoder_hidden_states"] for words in ("a cat", "")]
    sampler = settings.sampler or ("ddim" if preset == "tiny-2b" else "dpm")
    resolved = {
        "sampler": sampler,
        "shift": settings.shift or 1.0,
        "steps": settings.steps,
        "guidance": 6.0 if settings.guidance is None else settings.guidance,
        "dynamic": sampler == "dpm" if settings.dynamic_guidance is None else settings.dynamic_guidance,
    }
    picture = None
    if image is not None:
        picture = (read_reference(image, settings.height, settings.width)[:, 0][None] + 1) / 2
    wanted = theirs(folder, settings, resolved, frames, picture, text).transpose(1, 2)
    padding = wanted.shape[2] - ours[0].shape[2]
    assert padding == (1 if preset.startswith("tiny-1.5") else 0)
    torch.testing.assert_close(ours[0], wanted[:, :, padding:], atol=2e-4, rtol=2e-4)
