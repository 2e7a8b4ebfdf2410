# SPDX-License-Identifier: Apache-2.0
"""What the README shows is run, and what it links to is there."""

import re
import shlex
from pathlib import Path

import pytest

from vidgen import ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_program_runs(program, capsys):
    exec(compile(program, "README.md", "exec"), {})
    assert "runs" in capsys.readouterr().out


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


def test_every_op_is_in_the_table():
    described = README.replace("inverses", "inverse_haar_2d inverse_haar_3d")
    assert [name for name in ops.OPS if not name.endswith("_backward") and name not in described] == []


def test_commands_use_options_that_exist(capsys):
    from vidgen.cli import main

    commands = [shlex.split(line, comments=True) for line in README.splitlines() if line.startswith("    vidgen ")]
    assert len(commands) >= 4
    for verb in {words[1] for words in commands}:
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        options = [w for words in commands if words[1] == verb for w in words if w.startswith("--") and "." not in w]
        known = text + ("--output" if verb == "train" else "")  # any field of the recipe
        assert [option for option in options if option not in known] == []
