# SPDX-License-Identifier: Apache-2.0
"""What decoding holds in memory does not grow with the number of frames: measured in processes of their own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    import torch
    from vidgen.device import peak_memory_bytes
    from vidgen.models import autoencoders
    from vidgen.models.autoencoders import cogvideox_vae_config, hunyuan_vae_config
    from vidgen.pipelines.folders import Parts
    from vidgen.pipelines.settings import Job, SampleSettings
    from vidgen.pipelines.text_to_video import SYSTEMS, decoded, write_frames

    system, whole, output = sys.argv[1], sys.argv[2] == "whole", Path(sys.argv[3])
    torch.manual_seed(0)
    vae = {
        "opensora_plan_v1_5": lambda: autoencoders.WFVAE(autoencoders.preset("small")),
        "opensora_plan_v1_3": lambda: autoencoders.WFVAE(autoencoders.preset("small_4x8x8")),
        "opensora_v2": lambda: autoencoders.HunyuanVAE(hunyuan_vae_config.preset("small")),
        "cogvideox": lambda: autoencoders.AutoencoderKLCogVideoX(cogvideox_vae_config.preset("tiny")),
    }[system]().eval()
    config = vae.config
    channels = getattr(config, "latent_dim", None) or config.latent_channels

    def peak():
        return peak_memory_bytes(torch.device("cpu")) / 2**20

    def run(frames):
        settings = SampleSettings(tile_frames=32)
        job = Job(Parts(Path("."), system=system), settings, frames, 128, 192, 8.0, torch.device("cpu"), torch.float32)
        shape = 1, channels, (frames - 1) // vae.frames_per_latent + 1, 16, 24
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if whole:
            with torch.no_grad():
                assert vae.decode(latent).shape[2] == frames
        else:
            write_frames(decoded(vae, job, latent), output / "video.mp4", output / "sheet.png", "", job)

    figures = {"loaded": peak()}
    for frames in [int(word) for word in sys.argv[4:]]:
        run(frames)
        figures[frames] = peak()
    print(json.dumps(figures))
""")


def peak_mib(system: str, how: str, folder, *frames: int) -> dict[str, float]:
    """Largest resident set in MiB after loading, and after videos of these numbers of frames, in one new process."""
    command = [sys.executable, "-c", PROGRAM, system, how, str(folder), *map(str, frames)]
    # Large blocks go back to the system as soon as they are freed, so that the figures are not the heap's moods.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["opensora_plan_v1_3", "opensora_plan_v1_5", "opensora_v2", "cogvideox"])
def test_decoding_longer_videos_takes_no_more_memory(tmp_path, system):
    alone = {frames: peak_mib(system, "stream", tmp_path, frames) for frames in (33, 65, 129)}
    used = {frames: figures[str(frames)] - figures["loaded"] for frames, figures in alone.items()}
    print(system, {frames: round(value) for frames, value in used.items()}, "MiB beyond the loaded model")
    # Up to some 50 frames the encoder of the mp4, which looks ahead, still fills; then nothing may grow.
    assert used[129] < 1.1 * used[65] and used[129] < 1.3 * used[33]
