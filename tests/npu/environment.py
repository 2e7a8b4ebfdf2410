# SPDX-License-Identifier: Apache-2.0
"""Packages for Ascend that must stay out of the main environment, and what a process needs to import them.

``python tests/npu/environment.py`` installs each into a folder of its own inside the virtual environment, unless it is
there: torch_npu with stand-ins for CANN, and triton-ascend, whose module has the name of Triton's. A process that has
that folder first on its path gets them, beside the torch of the main environment. Where a package cannot be had, the
reason is written down and tests that need it are skipped with it; in CI that is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = Path(sys.prefix)
TORCH = "2.13.0"  # torch_npu is built for exactly one version of torch
PACKAGES = {
    "torch_npu": [f"torch_npu=={TORCH}"],  # and PyYAML, which the main environment has
    "triton_ascend": ["triton-ascend==3.2.0", "attrs", "decorator", "psutil"],  # and pybind11
}


def why_not(name: str) -> str | None:
    """Why the package called ``name`` in PACKAGES cannot be used, or None where it can."""
    folder = VENV / name
    if (folder / "complete").exists():
        return None
    reason = folder / "missing"
    return reason.read_text() if reason.exists() else f"{name} is not installed; `make test` installs it"


def required() -> bool:
    """Whether a missing package is a failure: in CI."""
    return bool(os.environ.get("CI")) or os.environ.get("VIDGEN_ASCEND") == "required"


def torch_npu() -> dict[str, str]:
    """Environment of a process that imports torch_npu with the stubs and sees one device."""
    stubs = VENV / "torch_npu" / "cann"
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(stubs), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(VENV / "torch_npu")]),
        "ASCEND_HOME_PATH": str(stubs),
        "ASCEND_OPP_PATH": str(stubs / "opp"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # a plain `import torch` is to stay one
        "TASK_QUEUE_ENABLE": "0",  # a launch that fails raises at its own line
        "OMP_NUM_THREADS": "1",
    }


def triton_ascend() -> dict[str, str]:
    """Environment of a process whose `triton` is triton-ascend."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(VENV / "triton_ascend")]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }


def prepare(name: str) -> None:
    """Install the package, or write down why it cannot be had."""
    folder = VENV / name
    (folder / "complete").unlink(missing_ok=True)
    try:
        install(name, folder)
        (folder / "missing").unlink(missing_ok=True)
        (folder / "complete").touch()
    except RuntimeError as error:
        folder.mkdir(exist_ok=True)
        (folder / "missing").write_text(f"{name} cannot be had here: {error}")


def install(name: str, folder: Path) -> None:
    if name == "torch_npu" and (found := version("torch").split("+")[0]) != TORCH:
        raise RuntimeError(f"torch_npu {TORCH} needs torch {TORCH}, and this is {found}")
    package, _, wanted = PACKAGES[name][0].replace("-", "_").partition("==")
    if not (folder / f"{package}-{wanted}.dist-info").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # into another folder first: one that is there is whole
        partial = folder.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        call([*pip, "--target", str(partial), *PACKAGES[name]])
        partial.replace(folder)
    if name == "torch_npu":
        if missing := [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]:
            raise RuntimeError(f"the stand-ins for CANN need {', '.join(missing)}")
        call([sys.executable, str(Path(__file__).with_name("cann_stubs.py")), str(folder / "cann"), str(folder)])
        call([sys.executable, "-c", "import torch, torch_npu; assert torch.npu.is_available()"], torch_npu())


def call(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"{command} failed").splitlines()[-1])


def main() -> None:
    for name in PACKAGES:
        prepare(name)
        if (reason := why_not(name)) is not None:
            if required():
                sys.exit(f"error: {reason}")
            print(f"{reason}; tests that need it will be skipped")


if __name__ == "__main__":
    main()
