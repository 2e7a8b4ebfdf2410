# SPDX-License-Identifier: Apache-2.0
"""A process that has torch_npu, and runs the functions of the files cases_*.py by name.

It stays alive, because importing torch_npu takes seconds; one that a C++ error has ended is replaced. This file is also
the program that the process runs. Cases may print: their output is that of the test.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection, Pipe
from typing import Any

TIMEOUT_S = 600


class Worker:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection[Any, Any] | None = None

    def run(self, case: str, **arguments: Any) -> Any:
        """What the function ``file.function`` of this folder returned; what it raised, as an AssertionError."""
        if self.process is None:
            self.start()
        assert self.connection is not None
        self.connection.send((case, arguments))
        try:
            ok, reply = self.connection.recv() if self.connection.poll(TIMEOUT_S) else (None, "no answer")
        except EOFError:
            ok, reply = None, "the process has ended; its last words are in the output"
        if ok is None:
            self.stop()
        if not ok:
            raise AssertionError(f"{case} {arguments}\n{reply}")
        return reply

    def start(self) -> None:
        here, there = Pipe()
        command = [sys.executable, "-m", "tests.npu.worker", str(there.fileno())]
        self.process = subprocess.Popen(command, env=self.environment, pass_fds=[there.fileno()])
        there.close()
        self.connection = here

    def stop(self) -> None:
        if self.process is None or self.connection is None:
            return
        self.connection.close()  # ends it
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = self.connection = None


def serve(descriptor: int) -> None:
    import torch
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
    connection: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            case, arguments = connection.recv()
        except EOFError:
            break
        file, _, function = case.partition(".")
        try:
            reply = True, getattr(importlib.import_module(f"tests.npu.{file}"), function)(**arguments)
        except Exception:
            reply = False, traceback.format_exc()
        sys.stdout.flush()
        connection.send(reply)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
