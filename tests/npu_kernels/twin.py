# SPDX-License-Identifier: Apache-2.0
"""Builds the Ascend C kernels with the CPU twin in place of CANN: once, for whichever test asks first."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.npu import environment
from vidgen.ops._backends.ascendc import _library

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "npu_kernels"
BUILD = ROOT / "build" / "ascendc_twin"


@contextmanager
def alone() -> Iterator[None]:
    """Of several test processes, one builds at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(target: str) -> Path:
    """CMake's target of that name as a library; made again only where its sources changed."""
    tools = Path(sys.executable).parent
    options = ["-DVIDGEN_TWIN=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if environment.why_not("torch_npu") is None:
        options.append(f"-DVIDGEN_TORCH_NPU={environment.VENV / 'torch_npu'}")
    with alone():
        configured = BUILD / "configured"  # with which options
        if not configured.exists() or configured.read_text() != str(options):
            run([str(tools / "cmake"), "-S", str(SOURCES), "-B", str(BUILD), "-G", "Ninja", *options])
            configured.write_text(str(options))
        run([str(tools / "ninja"), "-C", str(BUILD), "-j", os.environ.get("JOBS", "2"), target])
    return BUILD / f"{target}.so"


def compile_library(source: Path) -> ctypes.CDLL:
    """A C++ file of this folder as a library, against the twin; made again where a source is newer."""
    out = BUILD / f"{source.stem}.so"
    with alone():
        newest = max(path.stat().st_mtime for path in [source, *SOURCES.rglob("*.h")])
        if not out.exists() or out.stat().st_mtime < newest:
            flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-shared", "-fPIC"]
            run(["c++", *flags, f"-I{SOURCES}", f"-I{SOURCES / 'twin'}", str(source), "-o", str(out)])
    return ctypes.CDLL(str(out))


def run(command: list[str]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


class Twin:
    """The operators ``vidgen_ascendc::*`` for CPU tensors, and what the twin saw."""

    def __init__(self) -> None:
        path = build("twin_cpu")
        _library.load(path)
        self.library = ctypes.CDLL(str(path))
        self.library.vidgen_twin_peaks.restype = ctypes.c_char_p

    def set_cores(self, cores: int) -> None:
        self.library.vidgen_twin_set_cores(cores)

    @contextmanager
    def ignoring_barriers(self) -> Iterator[None]:
        """Kernels run as if they had no PipeBarrier."""
        self.library.vidgen_twin_ignore_barriers(True)
        try:
            yield
        finally:
            self.library.vidgen_twin_ignore_barriers(False)

    def peaks(self) -> dict[str, int]:
        """Bytes of unified buffer that launches since the last call took, by kernel."""
        lines = self.library.vidgen_twin_peaks().decode().splitlines()
        self.library.vidgen_twin_forget_peaks()
        return {kernel: int(taken) for kernel, taken in (line.split() for line in lines)}
