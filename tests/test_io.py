# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, manifests and locks, with processes that are really killed."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidgen import io

ROOT = Path(__file__).resolve().parents[1]


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A second process that runs ``program`` and prints a line when it is where the test wants it."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_atomic_write_text_and_bytes(tmp_path):
    with io.atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("grüße")
    with io.atomic_write(tmp_path / "b.bin") as file:
        file.write(b"\x00\x01")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "grüße"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_atomic_write_error_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyError), io.atomic_write(target, "w") as file:
        file.write("new")
        raise KeyError("stop")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_write_file_mode_follows_umask(tmp_path):
    with io.atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_write_goes_through_a_symbolic_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with io.atomic_write(tmp_path / "link", "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_atomic_write_refuses(tmp_path):
    with pytest.raises(ValueError, match="mode must be"), io.atomic_write(tmp_path / "a", "a"):
        pass
    with pytest.raises(IsADirectoryError), io.atomic_write(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), io.atomic_write(tmp_path / "no" / "a"):
        pass


def test_atomic_path_keeps_the_suffix(tmp_path):
    with io.atomic_path(tmp_path / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == tmp_path
        temporary.write_bytes(b"x")
    assert (tmp_path / "clip.mp4").read_bytes() == b"x"


def test_kill_in_the_middle_of_a_write(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old" * 1000)
    program = """
import sys, time
from vidgen import io
with io.atomic_write(sys.argv[1]) as file:
    file.write(b"new" * 500_000)
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""
    process = start(program, target)
    assert process.stdout.readline() == "half\n"
    kill(process)
    assert target.read_bytes() == b"old" * 1000


def test_kills_at_any_moment_leave_old_or_new(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"0" * 300_000)
    program = """
import itertools, sys
from vidgen import io
print("go", flush=True)
for i in itertools.count(1):
    with io.atomic_write(sys.argv[1]) as file:
        for _ in range(3):
            file.write(str(i % 10).encode() * 100_000)
"""
    for delay in (0.0, 0.003, 0.01, 0.03):
        process = start(program, target)
        process.stdout.readline()
        time.sleep(delay)
        kill(process)
        content = target.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "ü"}}
    io.write_json(tmp_path / "x.json", value)
    assert io.read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        ("[NaN]", "not finite"),
        ("[-Infinity]", "not finite"),
        ("[1e999]", "not finite"),
        ('{"a": ', "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_read_json_refuses(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        io.read_json(path)
    assert str(path) in str(caught.value)


def test_read_json_refuses_other_encodings(tmp_path):
    (tmp_path / "x.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="x.json"):
        io.read_json(tmp_path / "x.json")


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="x.json"):
        io.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def make_checkpoint(parent: Path, step: int) -> Path:
    temporary = parent / f"step_{step}.tmp"
    (temporary / "model").mkdir(parents=True)
    (temporary / "model" / "weights.bin").write_bytes(os.urandom(1000))
    (temporary / "state.json").write_text("{}")
    io.commit_directory(temporary, parent / f"step_{step}")
    return parent / f"step_{step}"


def test_manifest_finds_every_kind_of_damage(tmp_path):
    good = make_checkpoint(tmp_path, 1)
    assert io.verify_manifest(good) == []
    assert set(io.read_json(good / "manifest.json")["files"]) == {"model/weights.bin", "state.json"}
    weights = good / "model" / "weights.bin"
    content = weights.read_bytes()

    weights.write_bytes(content[:-1])
    assert "999 bytes" in io.verify_manifest(good)[0]
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert "SHA-256" in io.verify_manifest(good)[0]
    weights.unlink()
    assert io.verify_manifest(good) == ["model/weights.bin: missing"]
    (good / "manifest.json").write_text('{"version": 1, "files": {"../x": {"size": 0, "sha256": ""}}}')
    assert "leaves the directory" in io.verify_manifest(good)[0]
    (good / "manifest.json").write_text('{"version": 1, "files": {"x": 3}}')
    assert "wanted size and sha256" in io.verify_manifest(good)[0]
    (good / "manifest.json").write_text("[]")
    assert "not a version 1 manifest" in io.verify_manifest(good)[0]
    (good / "manifest.json").unlink()
    assert len(io.verify_manifest(good)) == 1


def test_manifest_refuses_symbolic_links(tmp_path):
    (tmp_path / "a").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="symbolic link"):
        io.write_manifest(tmp_path)


def test_commit_directory_never_overwrites(tmp_path):
    make_checkpoint(tmp_path, 1)
    with pytest.raises(FileExistsError):
        make_checkpoint(tmp_path, 1)
    assert io.verify_manifest(tmp_path / "step_1") == []


def test_newest_valid_passes_over_damage_with_a_warning(tmp_path, caplog):
    assert io.newest_valid(tmp_path / "none") is None
    assert io.newest_valid(tmp_path) is None
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_200.tmp").mkdir()
    (tmp_path / "step_x").mkdir()
    assert io.newest_valid(tmp_path) == tmp_path / "step_100"
    (tmp_path / "step_100" / "state.json").write_text("{ }")
    (tmp_path / "step_300").mkdir()  # no manifest
    with caplog.at_level(logging.WARNING):
        assert io.newest_valid(tmp_path) == tmp_path / "step_10"
    assert [record.args[0].name for record in caplog.records] == ["step_300", "step_100"]


HOLD = """
import sys, time
from vidgen import io
with io.lock_directory(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_a_killed_one_frees_the_lock(tmp_path, caplog):
    directory = tmp_path / "run"
    holder = start(HOLD, directory)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(io.LockError, match=f"process {holder.pid} on host"), io.lock_directory(directory):
        pass
    kill(holder)
    with caplog.at_level(logging.WARNING), io.lock_directory(directory):
        assert (directory / ".lock").read_text().startswith(f"{os.getpid()} ")
    assert f"taking over the lock of process {holder.pid}" in caplog.text
    with io.lock_directory(directory):  # and after a normal end there is nothing to take over
        pass


def test_lock_is_refused_within_one_process_too(tmp_path):
    with io.lock_directory(tmp_path):
        with pytest.raises(io.LockError, match="in use"), io.lock_directory(tmp_path):
            pass
        # the refusal above must not have freed it
        with pytest.raises(io.LockError, match="in use"), io.lock_directory(tmp_path):
            pass


def test_lock_of_another_host_is_refused(tmp_path):
    (tmp_path / ".lock").write_text("12 elsewhere\n")
    with pytest.raises(io.LockError, match=r"process 12 on host elsewhere.*delete"), io.lock_directory(tmp_path):
        pass


def test_forked_child_does_not_keep_the_lock(tmp_path):
    program = """
import os, sys, time
from vidgen import io
with io.lock_directory(sys.argv[1]):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)  # said by the child: by now it has left os.fork and its hooks
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
    holder = start(program, tmp_path)
    child = int(holder.stdout.readline())
    with pytest.raises(io.LockError), io.lock_directory(tmp_path):
        pass
    kill(holder)
    try:
        with io.lock_directory(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_parse_json_is_json():
    assert io.parse_json(json.dumps({"a": [1.5, "x"]})) == {"a": [1.5, "x"]}


def test_a_manifest_takes_what_the_writers_of_files_say(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    known = {"a": {"size": 1, "sha256": "f" * 64}}
    io.write_manifest(tmp_path, known)
    assert io.verify_manifest(tmp_path) == ["a: its SHA-256 is not the one in the manifest"]
    assert io.verify_manifest(tmp_path, 1, 2) == []  # the second half of the files
    assert len(io.verify_manifest(tmp_path, 0, 2)) == 1
    with pytest.raises(OSError, match="1 bytes, the process that wrote it says 2"):
        io.write_manifest(tmp_path, {"a": {"size": 2, "sha256": "f" * 64}})
    with pytest.raises(FileNotFoundError, match="not to be seen here"):
        io.write_manifest(tmp_path, {**known, "c": known["a"]})
