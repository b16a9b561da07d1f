# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's process and workers, forked from the trainer's with faults in them: [`Faults`] for the children of a federation."""

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from fedlpp_hf.processes import child, owner_handler, service, workers
from tests.faults import Faults


IMPORTED = (owner_handler, workers)  # what the processes run; here, so that those which are forked have it


@dataclass(frozen=True, slots=True)
class Plan:
    """Which process is killed where, among those that a trainer starts.

    Args:
        root: Operations on files below it count.
        folder: Gets what tells of the processes; outside `root`.
        victim: What the library calls the process: `owner`, or `client worker`; empty to count the operations of all.
        at: The first such process that comes to the operation with this number dies in it.
    """

    root: str
    folder: str
    victim: str = ""
    at: int | None = None

    def read_operations(self, name: str) -> list[list[str]]:
        """The kinds of operations of each process that the library calls so, in order."""
        return [path.read_text().split() for path in sorted(Path(self.folder).glob(f"{name}-*"))]

    def read_kind(self) -> str:
        """The kind of operation at which one was killed; empty if none was."""
        path = Path(self.folder) / "kind"
        return path.read_text() if path.exists() else ""


def fork_processes(plan: Plan | None = None) -> None:
    """From now on, fork what [`service.Service`] starts, with the faults of a plan."""

    def fork(command: list[str], *, env: dict[str, str], pass_fds: Sequence[int], **_: Any) -> ForkedProcess:
        return ForkedProcess(plan, env, pass_fds[0])

    names = {"DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    service.subprocess = SimpleNamespace(Popen=fork, **names)


class ForkedProcess:
    """What [`Service`] needs of `subprocess.Popen`, for a process that is forked and may have a fault."""

    def __init__(self, plan: Plan | None, environment: dict[str, str], descriptor: int):
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _serve(plan, environment, descriptor)

    def wait(self, timeout: float = 60.0) -> int:
        end = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


class ChildFaults(Faults):
    """Kills one process, of all that come to the operation, and writes down the operations of each."""

    def __init__(self, plan: Plan, name: str):
        super().__init__(Path(plan.root), plan.at)
        self.name, self.folder = name, Path(plan.folder)

    def is_due(self, number: int, kind: str) -> bool:
        with (self.folder / f"{self.name}-{os.getpid()}").open("a") as file:
            file.write(f"{kind}\n")
        if number != self.at:
            return False
        try:
            (self.folder / "killed").touch(exist_ok=False)
        except FileExistsError:  # another one has died
            return False
        (self.folder / "kind").write_text(kind)
        return True


def _serve(plan: Plan | None, environment: dict[str, str], descriptor: int) -> NoReturn:
    """What `python -c` of [`child.BOOTSTRAP`] does, with the faults of the plan if this is the victim."""
    code = 1
    try:
        os.closerange(3, descriptor)  # the sockets of others, which must learn from their end that the trainer is gone
        os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(environment)
        prefix = child.scratch_prefix

        def begin(name: str) -> str:
            if plan is not None and plan.victim in ("", name):
                ChildFaults(plan, name).install()
            return prefix(name)

        child.scratch_prefix = begin  # called before a process makes its first file
        child.main(descriptor)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
