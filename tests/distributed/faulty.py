# SPDX-License-Identifier: Apache-2.0
"""The command vidgen, in which one process does something bad at a step of its first attempt.

FAULT=kill:1:5 kills rank 1 when step 5 begins, ``saving`` when it has written its part of a checkpoint from then on;
``sleep`` waits for ever, ``raise`` raises a ValueError there alone, ``term`` sends SIGTERM to what started the process.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from vidgen.cli import main
from vidgen.parallel import launch
from vidgen.train import loop, sharded_checkpoint

what, rank, step = os.environ["FAULT"].split(":")
take, write = loop._Run._step, sharded_checkpoint.write_pieces


def sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def wait_for(checkpoint: Path) -> None:
    while not checkpoint.exists():  # it is written in the background
        time.sleep(0.02)


def write_and_die(*args: Any) -> None:
    write(*args)
    os.kill(os.getpid(), signal.SIGKILL)


def faulty(run: Any) -> Any:
    if run.step + 1 == int(step) and launch.rank() == int(rank) and launch.restarts() == 0:
        if what == "kill":
            wait_for(run.output / "step_00000002")
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "saving":
            wait_for(run.output / "step_00000002")
            sharded_checkpoint.write_pieces = write_and_die
        elif what == "sleep":
            sleep_for_ever()
        elif what == "raise":
            raise ValueError("clip 7 is nowhere to be found")
        elif what == "term":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)  # for it to be passed on
    return take(run)


if __name__ == "__main__":
    loop._Run._step = faulty  # type: ignore[method-assign]
    launch.leave(main())
