# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: ``step_00000010/``, complete or absent, whatever moment the writer is killed at.

model/               weights as trained, a folder that from_pretrained reads
ema/                 averaged weights, the same (where an average is kept)
optimizer.safetensors, optimizer.json
rng.safetensors, state.json   random generators, step, samples seen, clipping statistics
config.yaml          the recipe
manifest.json        size and SHA-256 of everything above
"""

from __future__ import annotations

import logging
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vidgen import device as devices
from vidgen.io import commit_directory, read_json, verify_manifest, write_json

logger = logging.getLogger(__name__)

PREFIX = "step_"


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(run) / f"{PREFIX}{step:08d}"


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run by their names, oldest first, verified or not."""
    name = re.compile(re.escape(PREFIX) + r"\d+")
    return sorted((p for p in Path(run).glob(PREFIX + "*") if name.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def save_checkpoint(run: str | Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Let ``fill(folder)`` write the parts, commit them under the name of the step, then delete all but ``keep``.

    Whatever ``fill`` or the disk raises passes through after the unfinished folder is removed; older checkpoints are
    deleted only once the new one is complete.

    Raises:
        OSError: the disk is full, or read-only, or gone.
    """
    try:
        fill(begin(run, step))
        return commit(run, step, keep=keep)
    except BaseException:
        abandon(run, step)
        raise


def begin(run: str | Path, step: int) -> Path:
    """A new folder for the parts of a checkpoint; `commit` makes it one, `abandon` removes it."""
    abandon(run, step)
    temporary = checkpoint_path(run, step).with_suffix(".tmp")
    temporary.mkdir(parents=True)
    return temporary


def commit(run: str | Path, step: int, known: dict[str, dict[str, Any]] | None = None, *, keep: int) -> Path:
    """Make what lies in the folder of `begin` the checkpoint of the step, then delete all but ``keep``.

    ``known``: see :func:`vidgen.io.write_manifest`.
    """
    final = checkpoint_path(run, step)
    temporary, replaced = final.with_suffix(".tmp"), final.with_suffix(".old.tmp")
    try:
        if final.exists():  # damaged, or from a line of steps that the run has since left
            final.rename(replaced)
        commit_directory(temporary, final, known)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    older = [path for path in checkpoints(run) if int(path.name[len(PREFIX) :]) < step]
    for path in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def abandon(run: str | Path, step: int) -> None:
    """Remove what a save of the step has left."""
    for suffix in (".tmp", ".old.tmp"):
        shutil.rmtree(checkpoint_path(run, step).with_suffix(suffix), ignore_errors=True)


def remove_unfinished(run: str | Path) -> None:
    """Delete what a killed save has left. Only for the holder of the run's lock."""
    for path in Path(run).glob(f"{PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(
    run: str | Path,
    resume: str,
    *,
    verify: Callable[[Path], list[str]] = verify_manifest,
    found: list[Path] | None = None,
) -> Path | None:
    """The checkpoint to go on from: ``resume`` is "auto" (the newest that verifies), "none", or a path.

    Args:
        verify: says what is wrong with a checkpoint, as :func:`vidgen.io.verify_manifest` does.
        found: the checkpoints of the run, oldest first; default: looked for.

    Raises:
        ValueError: a path that holds no checkpoint or a damaged one; "none" where the run has checkpoints already;
            "auto" where it has some but none that verifies.
    """
    found = checkpoints(run) if found is None else found
    if resume == "none":
        if found:
            raise ValueError(
                f"{run} holds a run already (newest: {found[-1].name}); go on with --resume auto, "
                "or give another --output"
            )
        return None
    if resume == "auto":
        for path in reversed(found):
            if not (problems := verify(path)):
                return path
            logger.warning("%s is damaged and is passed over: %s", path, "; ".join(problems[:10]))
        if found:
            raise ValueError(f"{run}: no checkpoint verifies; refusing to start from nothing over them")
        return None
    path = Path(resume)
    if problems := verify(path):
        raise ValueError(f"--resume {resume}: {'; '.join(problems[:10])}")
    return path


def resume_after(run: str | Path, resume: str, restarts: int) -> str:
    """What ``resume`` means to a run that is started again by itself: its own newest checkpoint, if it wrote one."""
    return "auto" if restarts and checkpoints(run) else resume


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write ``optimizer.safetensors`` (tensors as ``INDEX.NAME``) and ``optimizer.json`` (the groups)."""
    from safetensors.torch import save_file

    state = optimizer.state_dict()
    tensors = {
        f"{i}.{name}": value.contiguous() for i, parts in state["state"].items() for name, value in parts.items()
    }
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "optimizer.json", state["param_groups"])


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore what `save_optimizer` wrote. Raises ValueError where it is another optimizer's."""
    from safetensors.torch import load_file

    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = read_json(folder / "optimizer.json")
    current = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in current]:
        raise ValueError(f"{folder}: the optimizer's parameters are not those of this model")
    for group in groups:
        group["betas"] = tuple(group["betas"])
    # moments follow their parameters, as torch saves them without a device
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_state(folder: Path, state: dict[str, Any], device: torch.device) -> None:
    """Write ``state.json`` and the random generators (Python's, torch's, the device's)."""
    from safetensors.torch import save_file

    version, words, gauss = random.getstate()
    generators = {"torch": torch.get_rng_state()}
    if (own := devices.rng_state(device)) is not None:
        generators["device"] = own
    save_file(generators, folder / "rng.safetensors")
    write_json(folder / "state.json", {**state, "python_rng": [version, list(words), gauss]})


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """Restore the random generators and return the rest of what `save_state` was given."""
    from safetensors.torch import load_file

    state = read_json(folder / "state.json")
    version, words, gauss = state.pop("python_rng")
    random.setstate((version, tuple(words), gauss))
    generators = load_file(folder / "rng.safetensors")
    torch.set_rng_state(generators["torch"])
    if "device" in generators and device.type != "cpu":
        devices.set_rng_state(device, generators["device"])
    return state
