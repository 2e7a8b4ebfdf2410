# SPDX-License-Identifier: Apache-2.0
"""A package that cannot be had is a skip with its reason, and in CI a failure."""

from pathlib import Path

import pytest

from . import environment
from .conftest import need


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("VIDGEN_ASCEND", raising=False)


def cannot(command: list[str], environment: dict[str, str] | None = None) -> None:
    raise RuntimeError("No matching distribution")


@pytest.mark.parametrize("name", environment.PACKAGES)
def test_missing_package_is_a_skip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str) -> None:
    with pytest.raises(pytest.skip.Exception, match="is not installed; `make test` installs it"):
        need(name)
    monkeypatch.setattr(environment, "call", cannot)
    environment.main()
    assert f"{name} cannot be had here: No matching distribution" in capsys.readouterr().out
    with pytest.raises(pytest.skip.Exception, match="cannot be had here: No matching distribution"):
        need(name)


@pytest.mark.parametrize("variable, value", [("CI", "true"), ("VIDGEN_ASCEND", "required")])
def test_missing_package_is_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(environment, "call", cannot)
    with pytest.raises(SystemExit, match="error: torch_npu cannot be had here"):
        environment.main()
    with pytest.raises(pytest.fail.Exception, match="cannot be had here"):
        need("torch_npu")


def test_other_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", lambda name: "2.10.0+cpu")
    monkeypatch.setattr(environment, "call", lambda *args: pytest.fail("nothing is to be installed"))
    environment.prepare("torch_npu")
    assert (
        environment.why_not("torch_npu")
        == "torch_npu cannot be had here: torch_npu 2.13.0 needs torch 2.13.0, and this is 2.10.0"
    )


def test_an_interrupted_installation_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What pip writes is moved into place when it is whole."""

    def half(command: list[str], environment: dict[str, str] | None = None) -> None:
        folder = Path(command[command.index("--target") + 1])
        assert folder != tmp_path / "triton_ascend"
        (folder / "triton_ascend-3.2.0.dist-info").mkdir(parents=True)
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(environment, "call", half)
    environment.prepare("triton_ascend")
    assert environment.why_not("triton_ascend") == "triton_ascend cannot be had here: the disk is full"
    assert not (tmp_path / "triton_ascend" / "triton_ascend-3.2.0.dist-info").exists()
