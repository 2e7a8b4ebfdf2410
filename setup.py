# SPDX-License-Identifier: Apache-2.0
"""Installs vidgen and builds its compiled kernels with CMake and ninja.

VIDGEN_BUILD=auto      build if a compiler is there, else install without kernels (default)
VIDGEN_BUILD=required  fail if the kernels cannot be built
VIDGEN_BUILD=off       do not build

Build without isolation, against the PyTorch that will run it:
    pip install --no-build-isolation -e .
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODES = ("auto", "required", "off")
LIBRARIES = ("_C.*", "_ascendc.*")  # vidgen/_C.<abi>.so and vidgen/_C.build.json; the same of the Ascend C kernels


def say(text: str) -> None:
    print(f"vidgen: {text}", file=sys.stderr, flush=True)


def missing() -> str | None:
    """Why the kernels cannot be built here, or None."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler!r} not found; Debian/Ubuntu: apt-get install g++)"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"no {tool} (pip install {tool})"
    try:
        import pybind11  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        return f"{error} (install torch and pybind11 first, then use --no-build-isolation)"
    return None


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode = os.environ.get("VIDGEN_BUILD", "auto")
        if mode not in MODES:
            sys.exit(f"vidgen: VIDGEN_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == "off":
            say("native CPU kernels: not built (VIDGEN_BUILD=off); every op runs on its reference")
            return
        reason = missing()
        if reason is None:
            try:
                self.build()
                say("native CPU kernels: built")
                return
            except subprocess.CalledProcessError as error:
                reason = f"{' '.join(map(str, error.cmd[:2]))} failed with exit status {error.returncode}"
        if mode == "required":
            sys.exit(f"vidgen: native CPU kernels: {reason}, and VIDGEN_BUILD=required")
        say(f"native CPU kernels: not built: {reason}; every op runs on its reference")

    def build(self) -> None:
        source, work = Path(__file__).parent.resolve(), Path(self.build_temp).resolve()
        staged = work / "staged"
        package = source / "vidgen" if self.inplace else Path(self.build_lib).resolve() / "vidgen"
        shutil.rmtree(staged, ignore_errors=True)
        package.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", source, "-B", work, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
        subprocess.run(["cmake", "--build", work], check=True)
        subprocess.run(["cmake", "--install", work, "--prefix", staged], check=True)
        for pattern in LIBRARIES:
            if new := list(staged.glob(pattern)):  # Ascend C kernels built before stay where there is no CANN now
                for old in package.glob(pattern):
                    old.unlink()
                for built in new:
                    shutil.move(built, package / built.name)

    def get_outputs(self) -> list[str]:
        return [str(p) for pattern in LIBRARIES for p in (Path(self.build_lib) / "vidgen").glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable install builds straight into the source tree."""


setup(ext_modules=[Extension("vidgen._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
