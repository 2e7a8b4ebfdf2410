# SPDX-License-Identifier: Apache-2.0
"""A run that waits for ever, because one process of many does, ends with a report of who waits where."""

from __future__ import annotations

import datetime
import faulthandler
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vidgen import device as devices

HUNG = 4  # exit code
START_FACTOR = 3.0  # loading, the first step and compilation take longer
GRACE_S = 30.0  # after which the report is left to a thread that needs no interpreter
# What the libraries say when a process that they talk to is gone, or has not answered in time.
WORDS = (*devices.COMMUNICATION.values(), "connection (closed|reset|refused)", "broken pipe", "timed? ?out", "socket")
LOST = re.compile("|".join(WORDS), re.IGNORECASE)


class Watchdog:
    """A thread that ends this process when a step takes longer than it may.

    ::

        with Watchdog(output / "hang", timeout_s=1800, rank=rank) as watchdog:
            for number in range(steps):
                watchdog.step(number)
                ...

    The stacks of all threads, with rank, host, step and time, are written to ``folder/rank_R.txt`` first; then the
    process exits with the code 4, so that whatever started it ends or restarts the others. Where something holds the
    interpreter and no thread of Python can run, the stacks go to stderr half a minute later. The report is also written
    when the block ends with an error that says that another process is gone or did not answer in time.

    Args:
        folder: made when there is something to report.
        timeout_s: of a step; the time until the first step, and the first step, may take three times that.
        rank: of this process.
        parent: this process ends when its parent is another one than this: what started it was killed.
        end: what ends the process.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        timeout_s: float,
        rank: int,
        parent: int | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.file, self.timeout_s, self.rank = Path(folder) / f"rank_{rank}.txt", timeout_s, rank
        self.parent, self.end = parent, end
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._steps = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat("the start", START_FACTOR)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is not None and lost_others(error):
            told = "".join(traceback.format_exception(error))
            self._write(f"{self._what} ended after {time.monotonic() - self._began:.1f} s: {str(error)[:150]}", told)

    def step(self, number: int) -> None:
        """A step begins, and with it its time."""
        self._steps += 1
        self._beat(f"step {number}", START_FACTOR if self._steps == 1 else 1.0)

    def phase(self, name: str, factor: float = START_FACTOR) -> None:
        """Something else than a step begins, which may take ``factor`` times as long: the end, a checkpoint."""
        self._beat(name, factor)

    def _beat(self, what: str, factor: float) -> None:
        with self._lock:
            self._what, self._began, self._limit = what, time.monotonic(), factor * self.timeout_s
        try:
            faulthandler.dump_traceback_later(self._limit + GRACE_S, exit=True)
        except (AttributeError, ValueError, OSError):  # stderr is no file
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout_s / 10)):
            if self.parent is not None and os.getppid() != self.parent:
                print(f"vidgen: rank {self.rank}: what started this process is gone", file=sys.stderr, flush=True)
                self.end(1)
                return
            with self._lock:
                what, seconds, limit = self._what, time.monotonic() - self._began, self._limit
            if seconds > limit:
                self._write(f"{what} has taken {seconds:.1f} s, the limit is {limit:g} s", stacks())
                self.end(HUNG)
                return

    def _write(self, what: str, text: str) -> None:
        """Add a report to the file; a disk that is full must not keep the process."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        head = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}, {now}\n{what}\n\n"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(head + text + "\n")
                file.flush()
                os.fsync(file.fileno())
            where = f"the stacks are in {self.file}"
        except OSError as error:
            where = f"{self.file} could not be written ({error}):\n{text}"
        print(f"vidgen: rank {self.rank}: {what}; {where}", file=sys.stderr, flush=True)


def stacks() -> str:
    """The stacks of all threads of this process, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, parts = threading.main_thread().ident, []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main):
        lines = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, '?')}:\n{lines}")
    return "\n".join(parts)


def lost_others(error: BaseException) -> bool:
    """Whether an error comes from talking to another process that is gone, or has not answered in time."""
    while True:
        is_plain = isinstance(error, RuntimeError) and type(error).__module__ in ("builtins", "torch.distributed")
        if is_plain and LOST.search(str(error)):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__
