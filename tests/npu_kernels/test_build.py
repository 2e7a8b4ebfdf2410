# SPDX-License-Identifier: Apache-2.0
"""Without CANN the folder is skipped, with one message that says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .twin import SOURCES


@pytest.mark.parametrize("home", [None, "a folder without CANN"])
def test_without_cann_one_message_says_so(tmp_path, home):
    environment = {name: value for name, value in os.environ.items() if name != "ASCEND_HOME_PATH"}
    if home is not None:
        (tmp_path / home).mkdir()
        environment["ASCEND_HOME_PATH"] = str(tmp_path / home)
    cmake = Path(sys.executable).parent / "cmake"
    command = [str(cmake), "-S", str(SOURCES), "-B", str(tmp_path / "build")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("-- vidgen")]
    assert len(lines) == 1 and "Ascend C kernels: not built: CANN was not found" in lines[0]
