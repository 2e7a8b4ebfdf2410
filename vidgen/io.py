# SPDX-License-Identifier: Apache-2.0
"""How files are written here: atomically, with manifests of sizes and hashes, under a lock.

A reader sees the whole old file or the whole new file, never a part, whatever moment the writer is killed at.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK = ".lock"


class LockError(RuntimeError):
    """Another process works in the directory."""


def fsync_directory(path: str | Path) -> None:
    """Make renames and new names inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends without an error it becomes ``path``.

    For libraries that insist on opening the file themselves. The temporary name keeps the suffix of ``path``. The file
    is fsynced, renamed over ``path``, and its directory fsynced. If the block raises, the temporary file is removed and
    ``path`` is what it was. A killed process leaves at most a hidden ``.NAME.*.tmp*`` file behind.

    Raises FileNotFoundError if the directory or, at the end, the temporary file does not exist.
    """
    final = Path(os.path.realpath(path))  # write through a symbolic link, do not replace it
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write a file over a directory", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(final.parent))
    temporary = final.with_name(f".{final.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp{final.suffix}")
    try:
        yield temporary
        _fsync_file(temporary)
        os.replace(temporary, final)
    except BaseException:  # also KeyboardInterrupt: nothing half-written stays behind
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(final.parent)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Yield a file open for writing that becomes ``path`` when the block ends without an error (see `atomic_path`).

    Args:
        path: the final name. Its directory must exist.
        mode: ``"wb"`` for bytes or ``"w"`` for UTF-8 text.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode must be 'w' or 'wb', got {mode!r}")
    with atomic_path(path) as temporary, open(temporary, mode, encoding="utf-8" if mode == "w" else None) as file:
        yield file


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a new directory beside ``path``; when the block ends without an error it becomes ``path``, by one rename.

    Every file and directory inside is fsynced first. If the block raises, all of it is removed. A killed process leaves
    at most a hidden ``.NAME.*.tmp`` directory behind.

    Raises FileExistsError if ``path`` exists, before or after.
    """
    final = Path(os.path.abspath(path))
    temporary = final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, "exists already", str(path))
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _fsync_file(Path(folder, name))
            fsync_directory(folder)
        if os.path.lexists(final):  # os.rename would replace an empty directory
            raise FileExistsError(errno.EEXIST, "exists already", str(path))
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(final.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity raise ValueError: JSON has no word for them."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"write_json: {path}: {error}") from error
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} appears twice in one object")
        result[key] = value
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is not finite")
    return value


def parse_json(text: str) -> Any:
    """Strict JSON: duplicate keys, NaN, infinities and numbers too large for a double raise ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_unique_object, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Read a UTF-8 JSON file strictly (see `parse_json`). Raises ValueError naming the file."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # json and unicode errors are ValueErrors
        raise ValueError(f"read_json: {path}: {error}") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files_below(directory: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(directory):
        for name in subfolders + names:
            path = Path(folder, name)
            if path.is_symlink():
                raise ValueError(f"write_manifest: {path} is a symbolic link; a manifest covers plain files only")
        files += [Path(folder, name) for name in names]
    return sorted(path for path in files if path != directory / MANIFEST)


def file_entry(path: str | Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and SHA-256."""
    return {"size": Path(path).stat().st_size, "sha256": sha256(path)}


def write_manifest(directory: str | Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write ``manifest.json`` with size and SHA-256 of every file below ``directory``, each fsynced first.

    Args:
        directory: what the manifest is of.
        known: entries of files, by name relative to ``directory``, from the processes that wrote and fsynced them.

    Raises:
        OSError: a file of ``known`` is not there, or has another size.
    """
    directory, known = Path(directory), known or {}
    files: dict[str, Any] = {}
    for path in _files_below(directory):
        name = path.relative_to(directory).as_posix()
        if name in known:
            files[name] = dict(known[name])
            if (size := path.stat().st_size) != known[name]["size"]:
                raise OSError(
                    errno.EIO, f"{size} bytes, the process that wrote it says {known[name]['size']}", str(path)
                )
        else:
            _fsync_file(path)
            files[name] = file_entry(path)
    if missing := sorted(known.keys() - files.keys()):
        raise FileNotFoundError(errno.ENOENT, "written by another process and not to be seen here", missing[0])
    for folder, _, _ in os.walk(directory):
        fsync_directory(folder)
    write_json(directory / MANIFEST, {"version": 1, "files": files})


def manifest_entries(directory: str | Path) -> dict[str, dict[str, Any]]:
    """The files that the manifest lists. Raises ValueError where it is not one that `write_manifest` writes."""
    directory = Path(directory)
    manifest = read_json(directory / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("version") == 1 else None
    if not isinstance(files, dict):
        raise ValueError(f"{directory / MANIFEST}: not a version 1 manifest")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise ValueError(f"{directory / MANIFEST}: {name}: wanted size and sha256, got {entry!r}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{directory / MANIFEST}: {name}: a name that leaves the directory")
    return files


def verify_manifest(directory: str | Path, part: int = 0, parts: int = 1) -> list[str]:
    """Compare every file that ``manifest.json`` lists with its size and SHA-256; return the problems, in words.

    An empty list means that all is well. Files that the manifest does not list are not looked at. Of ``parts``
    processes that share the work, each looks at its ``part``: every so many-th file.
    """
    directory = Path(directory)
    try:
        entries = manifest_entries(directory)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = []
    for name, entry in list(entries.items())[part::parts]:
        path = directory / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {entry['size']}")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{name}: its SHA-256 is not the one in the manifest")
    return problems


def commit_directory(
    temporary: str | Path, final: str | Path, known: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Turn a directory that has been filled into ``final``: manifest (see `write_manifest`), fsync, one rename, last.

    ``final`` either does not exist or is complete. Both must lie on one file system.
    Raises FileExistsError if ``final`` exists.
    """
    temporary, final = Path(temporary), Path(final)
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, "commit_directory: exists already", str(final))
    write_manifest(temporary, known)
    os.rename(temporary, final)
    fsync_directory(final.parent)


def newest_valid(parent: str | Path, prefix: str = "step_") -> Path | None:
    """The directory ``parent/PREFIXnumber`` with the largest number whose manifest verifies, or None.

    Each newer one that does not verify is passed over with a warning that says why. Names with anything after the
    number (``step_10.tmp``, a save that was cut off) are not candidates.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return None
    name = re.compile(re.escape(prefix) + r"(\d+)")
    candidates = [(int(match[1]), path) for path in parent.iterdir() if (match := name.fullmatch(path.name))]
    for _, path in sorted(candidates, reverse=True):
        problems = verify_manifest(path)
        if not problems:
            return path
        logger.warning("%s is damaged and is passed over: %s", path, "; ".join(problems[:10]))
    return None


# Lock files that this process holds. A forked child must let go of its copies, or it would keep the lock alive after
# the parent has been killed.
_held: set[int] = set()


def _release_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def lock_directory(path: str | Path) -> Iterator[None]:
    """Hold ``path/.lock`` so that no second process writes into the same directory. The directory is created.

    The lock is ``flock``: the kernel frees it when the process ends, also by kill -9. The file's text (pid and host)
    is for people, and for file systems that do not carry ``flock`` between hosts: a lock left by another host is
    refused, since from here nobody can tell whether its process lives.

    Raises LockError naming the holder.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    file = path / LOCK
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        pid, _, host = os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip().partition(" ")
        if not free:
            raise LockError(f"{path} is in use by process {pid or '?'} on host {host or '?'}; choose another directory")
        if host and host != socket.gethostname():
            raise LockError(
                f"{path} was locked by process {pid} on host {host}, which did not say goodbye; "
                f"if that process has ended, delete {file}"
            )
        if pid.isdecimal() and not _alive(int(pid)):
            logger.warning("%s: taking over the lock of process %s, which has ended", path, pid)
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which has closed it already
            _held.remove(descriptor)
            os.ftruncate(descriptor, 0)  # the file stays: deleting a locked file would let two processes lock two files
            os.close(descriptor)
