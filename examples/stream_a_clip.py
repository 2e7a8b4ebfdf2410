# SPDX-License-Identifier: Apache-2.0
"""A clip of any length through the WFVAE in pieces: the memory it takes does not grow with the number of frames.

    python examples/stream_a_clip.py CLIP OUTPUT.mp4 [--vae FOLDER] [--size 64]

Without --vae the network is a tiny untrained one: the picture is noise, the plumbing is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from vidgen.data.transforms import resize_crop, to_frames
from vidgen.data.video import open_video, write_video
from vidgen.models.autoencoders import WFVAE, preset


def clip_in_pieces(path: str, size: int, frames_at_once: int) -> Iterator[Tensor]:
    """``(1, 3, frames, size, size)`` in [-1, 1], as many frames in all as the VAE takes: 8n + 1."""
    with open_video(path) as reader:
        count = (reader.num_frames - 1) // 8 * 8 + 1
        for first in range(0, count, frames_at_once):
            frames = reader.frames(range(first, min(first + frames_at_once, count)))
            yield resize_crop(frames, size, size)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode and decode a clip in pieces.")
    parser.add_argument("clip")
    parser.add_argument("output")
    parser.add_argument("--vae", help="model folder of a WFVAE")
    parser.add_argument("--size", type=int, default=64, help="of the square that is cut out, a multiple of 8")
    options = parser.parse_args()

    torch.manual_seed(0)
    vae = WFVAE.from_pretrained(options.vae) if options.vae else WFVAE(preset("tiny"))
    vae.eval()
    pieces = clip_in_pieces(options.clip, options.size, frames_at_once=16)
    # Moments leave the encoder, and frames the decoder, as soon as they are known; nothing waits for the whole clip.
    latents = (vae.normalize(moments.chunk(2, dim=1)[0]) for moments in vae.encode_stream(pieces))
    frames = [to_frames(video[0]) for video in vae.decode_stream(latents) if video.shape[2]]
    with open_video(options.clip) as reader:
        write_video(options.output, torch.cat(frames), reader.fps)
    print(f"{sum(len(piece) for piece in frames)} frames in {len(frames)} pieces: {options.output}")


if __name__ == "__main__":
    main()
