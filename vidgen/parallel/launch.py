# SPDX-License-Identifier: Apache-2.0
"""``vidgen train --nproc N``: the processes of one node, started, told of signals, and started again.

Each process finds in its environment what torchrun would put there, so that it cannot tell which of the two started it.
Unlike torchrun this one waits for a checkpoint as long as it takes when it is told to end, and its exit code is that of
the processes. Several nodes are torchrun's.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from .layout import Parallel
from .watchdog import HUNG

FAILED = 1
FINAL = (3, 2, 130)  # exit codes of vidgen that starting again does not change, the most telling first
GRACE_S = 15.0  # for the others to write their reports, once one has failed
POLL_S = 0.1
PARENT = "VIDGEN_LAUNCHER"  # process id of the launcher


# In the processes


def rank() -> int:
    """The number of this process among those of a run, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def is_one_of_many() -> bool:
    """Whether this process was started together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarts() -> int:
    """How often the processes have been started again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def parent() -> int | None:
    """The process that must live as long as this one, if it was started by `launch`."""
    number = os.environ.get(PARENT)
    return None if number is None else int(number)


def meeting_place(timeout: datetime.timedelta) -> dict[str, Any]:
    """Where the processes meet: ``store``, ``rank`` and ``world_size`` for ``torch.distributed.init_process_group``.

    torchrun keeps one store when it starts processes again, with the addresses of those that are gone in it. Each start
    has a part of the store for itself.
    """
    import torch.distributed as dist

    store, number, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return {"store": dist.PrefixStore(f"start/{restarts()}", store), "rank": number, "world_size": world}


def say_once(text: str, *, unless_others_spoke: bool = False) -> None:
    """Print a line on stderr, unless another process of the run has printed the same, whichever rank it names.

    With ``unless_others_spoke``, unless another process has printed anything.
    """
    if _is_first_to_say(re.sub(r"rank \d+(, (\d+|\.\.\.))*: ", "", text), unless_others_spoke):
        print(text, file=sys.stderr, flush=True)


def _is_first_to_say(text: str, of_all: bool) -> bool:
    if not is_one_of_many():
        return True
    import torch.distributed as dist

    prefix = f"vidgen/said/{restarts()}/"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=5))
        is_first = store.add(prefix + hashlib.sha256(text.encode()).hexdigest(), 1) == 1
        return (store.add(prefix + "all", 1) == 1 or not of_all) and is_first
    except (KeyError, ValueError, RuntimeError):  # the store may be gone with the first process
        return True


def leave(code: int) -> NoReturn:
    """End this process. One of many that failed does not wait for its threads: the others may never answer these."""
    if code and is_one_of_many():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# In the launcher


def without(arguments: Sequence[str], *options: str) -> list[str]:
    """``arguments`` without these options and their values, as ``--name value`` or ``--name=value``."""
    kept, skipped = [], False
    for argument in arguments:
        if skipped:
            skipped = False
        elif argument in options:
            skipped = True
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept


def check(parallel: Parallel | None, processes: int, max_restarts: int) -> None:
    """Raise ValueError before anything is started that could not run."""
    if processes < 1:
        raise ValueError(f"--nproc must be positive, got {processes}")
    if max_restarts < 0:
        raise ValueError(f"--max-restarts must not be negative, got {max_restarts}")
    if "RANK" in os.environ:
        raise ValueError("--nproc starts processes, and this is one of several that torchrun has started; leave it out")
    (parallel or Parallel()).sizes(processes)


def launch(command: Sequence[str], processes: int, *, max_restarts: int = 0, grace_s: float = GRACE_S) -> int:
    """Run ``command`` in so many processes until all have ended; the exit code.

    SIGTERM is passed on and the processes are waited for. So is ctrl-C, but whoever has not ended within ``grace_s`` is
    killed. When one fails, the others have ``grace_s`` to end, and all are started again, up to ``max_restarts`` times,
    unless the exit code says that this changes nothing.

    Returns:
        0 where all ended well; otherwise the code of the process that failed, 128 + n where signal n killed it.
    """
    with _caught_signals() as caught:
        for attempt in range(max_restarts + 1):
            code = _run(command, processes, attempt, max_restarts, caught, grace_s)
            if signal.SIGINT in caught:
                return 130
            if code == 0 or code in FINAL or caught or attempt == max_restarts:
                return code
            left = max_restarts - attempt - 1
            print(f"vidgen: a process ended with code {code}; starting all again ({left} left)", file=sys.stderr)
    raise AssertionError("not reached")


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Numbers of the signals that arrive, in a list; they do nothing else."""
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, frame: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(
    command: Sequence[str], processes: int, attempt: int, max_restarts: int, caught: list[int], grace_s: float
) -> int:
    """One attempt: start all, wait for all."""
    import torch.distributed as dist

    # Port 0: one that is free; the processes meet here, and the port stays taken as long as they live.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    facts = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    facts |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    facts |= {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_MAX_RESTARTS": max_restarts}
    facts |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, PARENT: os.getpid()}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(processes):
            own = {**facts, "RANK": number, "LOCAL_RANK": number}
            # A session of its own: ctrl-C of the terminal reaches a process through this one, once.
            started.append(subprocess.Popen(command, env=environment(processes, own), start_new_session=True))
        return _wait(started, caught, grace_s)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
        del store


def environment(processes: int, facts: Mapping[str, Any]) -> dict[str, str]:
    """The variables of one of so many processes: those of this one, ``facts``, and its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    return {**threads, **os.environ, **{name: str(value) for name, value in facts.items()}}


def _wait(started: Sequence[subprocess.Popen[bytes]], caught: list[int], grace_s: float) -> int:
    deadline, passed_on = None, 0
    while any(process.poll() is None for process in started):
        for number in caught[passed_on:]:
            passed_on += 1
            _tell(started, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        if deadline is None and (signal.SIGINT in caught or any(p.poll() not in (None, 0) for p in started)):
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            codes = [process.poll() for process in started]
            _tell(started, signal.SIGKILL)
            return _code([code for code in codes if code is not None] or [130])
        time.sleep(POLL_S)
    return _code([process.wait() for process in started])


def _tell(started: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


def _code(codes: Sequence[int]) -> int:
    """The exit code of all: what says most of why they ended."""
    telling = [*FINAL, HUNG, *(code for code in codes if code < 0), FAILED]
    code = next((code for code in telling if code in codes), max(codes))
    return 128 - code if code < 0 else code
