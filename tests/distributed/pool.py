# SPDX-License-Identifier: Apache-2.0
"""Processes of one gloo group that stay alive and run functions of this folder by name.

``function`` is one of attention_cases.py, ``module.function`` one of another file here.

This file is also the program that the processes run.
"""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

TIMEOUT_S = 240  # of a collective, and of a case: long, for machines that have much else to do
MAX_GROUPS = 90  # in a process, before the processes are started anew: threads of gloo wake up 100 times a second


class Pool:
    """``run(case, ranks, ...)`` returns what the case returned on each rank. Starts with the first case."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world, self.starts = folder, world, 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection[Any, Any]] = []

    def run(self, case: str, ranks: int, **arguments: Any) -> list[Any]:
        if not self.processes:
            self.start()
        for connection in self.connections[:ranks]:
            connection.send((case, ranks, arguments))
        replies = []
        for connection in self.connections[:ranks]:
            try:
                replies.append(connection.recv() if connection.poll(TIMEOUT_S + 30) else (False, "no answer"))
            except EOFError:
                replies.append((False, "the process has ended"))
        if failures := [f"rank {rank}: {reply}" for rank, (ok, reply) in enumerate(replies) if not ok]:
            self.stop()  # the group may be out of step
            raise AssertionError(f"{case} {arguments}\n" + "\n".join(failures))
        answers, groups = zip(*(reply for _, reply in replies), strict=True)
        if max(groups) > MAX_GROUPS:
            self.stop()
        return list(answers)

    def start(self) -> None:
        self.starts += 1
        store = self.folder / f"store{self.starts}"
        package = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), *sys.path]), "OMP_NUM_THREADS": "1"}
        for rank in range(self.world):
            here, there = Pipe()
            command = [sys.executable, __file__, str(there.fileno()), str(rank), str(self.world), str(store)]
            self.processes.append(subprocess.Popen(command, env=environment, pass_fds=[there.fileno()]))
            there.close()
            self.connections.append(here)

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()  # ends the worker
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes, self.connections = [], []


def serve(descriptor: int, rank: int, world: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    cases: Any = importlib.import_module("attention_cases")  # this folder is first on the path of a program in it
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    cases.make_groups(world, timeout)
    connection: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            case, ranks, arguments = connection.recv()
        except EOFError:
            break
        try:
            module, function = case.rsplit(".", 1) if "." in case else ("attention_cases", case)
            answer = getattr(importlib.import_module(module), function)(cases.GROUPS[tuple(range(ranks))], **arguments)
            reply = True, (answer, len(dist.distributed_c10d._world.pg_map))
        except Exception:
            reply = False, traceback.format_exc()
        connection.send(reply)
    os._exit(0)  # the others may be gone: nothing to say goodbye to


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
