# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch

from vidgen.data.video import open_video
from vidgen.evaluation.metrics import psnr
from vidgen.pipelines import reconstruct as module
from vidgen.pipelines.reconstruct import ReconstructSettings, read_clip, reconstruct

SMALL = ReconstructSettings(frames=9, height=32, width=48, device="cpu")


def test_round_trip_of_a_real_clip(model_folder, real_clip, tmp_path):
    facts = reconstruct(real_clip, model_folder / "vae", tmp_path, SMALL)
    assert facts["video_shape"] == [3, 9, 32, 48] and facts["latent_shape"] == [4, 2, 4, 6]
    assert 0 < facts["psnr"] < 30 and -1 <= facts["ssim"] < 1  # random weights
    stored = json.loads((tmp_path / "man_reconstructed.json").read_text())
    assert stored["psnr"] == facts["psnr"]
    with open_video(facts["video"]) as reader:
        assert (reader.num_frames, reader.height, reader.width) == (9, 32, 96)  # side by side
        written = reader.frames([0])[0, :, :48]
    original = read_clip(real_clip, SMALL)[0]
    assert float(psnr(module.to_video(written[None])[0], original[:, :1])) > 25  # the left half is the clip
    assert (tmp_path / "man_reconstructed.png").read_bytes()[:4] == b"\x89PNG"


def test_measures_are_those_of_the_frames(model_folder, real_clip, tmp_path, monkeypatch):
    original = read_clip(real_clip, SMALL)[0]
    noisy = (original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    monkeypatch.setattr(module, "round_trip", lambda model, video: (noisy, [1]))
    facts = reconstruct(real_clip, model_folder / "vae", tmp_path, SMALL)
    assert facts["psnr"] == pytest.approx(float(psnr(noisy, original)), abs=0.05)


def test_a_perfect_round_trip_has_no_psnr(model_folder, real_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "round_trip", lambda model, video: (video, [1]))
    facts = reconstruct(real_clip, model_folder / "vae", tmp_path, SMALL)
    assert facts["psnr"] is None and facts["ssim"] == pytest.approx(1)


def test_sizes_come_from_the_clip(model_folder, real_clip, tmp_path):
    facts = reconstruct(real_clip, model_folder / "vae", tmp_path, ReconstructSettings(frames=1), dry_run=True)
    assert facts["video_shape"] == [3, 1, 144, 176]
    assert not list(tmp_path.iterdir())


BAD = {
    "frames": (ReconstructSettings(frames=8), "frames must be 8n\\+1"),
    "size": (ReconstructSettings(height=20, width=32), "multiples of 8"),
    "start": (ReconstructSettings(start=500), "start must lie in 0..119"),
    "length": (ReconstructSettings(frames=17, start=110), "too short"),
    "rate": (ReconstructSettings(fps=60.0), "60 wanted"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(model_folder, real_clip, tmp_path, name):
    settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        reconstruct(real_clip, model_folder / "vae", tmp_path, settings)


@pytest.mark.parametrize(
    "system, preset, frames, latent, refused",
    [
        ("opensora_plan_v1_3", "tiny", 13, [4, 4, 4, 6], "frames must be 4n\\+1, got 14"),
        ("opensora_v2", "tiny", 5, [4, 2, 4, 6], "frames must be 4n\\+1, got 6"),
        ("cogvideox", "tiny-5b", 9, [4, 3, 4, 6], "frames must be 8n\\+1, got 10"),
    ],
)
def test_the_vae_of_every_system(make_model, real_clip, tmp_path, system, preset, frames, latent, refused):
    vae = make_model(system, preset) / "vae"
    settings = replace(SMALL, frames=frames)
    facts = reconstruct(real_clip, vae, tmp_path, settings)
    assert facts["latent_shape"] == latent and facts["video_shape"] == [3, frames, 32, 48]
    with open_video(facts["video"]) as reader:
        assert reader.num_frames == frames
    with pytest.raises(ValueError, match=refused):
        reconstruct(real_clip, vae, tmp_path, replace(settings, frames=frames + 1))


def test_a_model_that_is_no_vae(model_folder, real_clip, tmp_path):
    with pytest.raises(ValueError, match="wanted _class_name WFVAE.*got 'SparseUMMDiT'"):
        reconstruct(real_clip, model_folder / "transformer", tmp_path, SMALL)
