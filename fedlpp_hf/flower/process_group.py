# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Processes that are ended together with everything they started."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


# Words in the commands of all processes that a SuperLink or SuperNode starts.
_FLOWER_COMMANDS = ("flower-super", "flwr-", "fedlpp_hf.flower.super")
_END_SECONDS = 15.0  # between SIGTERM and SIGKILL


@contextlib.contextmanager
def run_group(
    command: Sequence[str], environment: dict[str, str], log: Path, pid_file: Path
) -> Iterator[subprocess.Popen]:
    """Run a process as the leader of a new process group, and end the whole group afterwards.

    A ServerApp can outlive its SuperLink, and a ClientApp that waits for its trainer can outlive its SuperNode. A group
    left behind by a killed predecessor is ended first.

    Args:
        command: a SuperLink's or SuperNode's.
        environment: all its environment variables.
        log: file for its output, appended.
        pid_file: file for the group's id; a lock beside it lasts as long as the process.

    Raises:
        ValueError: if another process holds the lock.
    """
    with open(pid_file.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"`{pid_file.parent}` is in use as the --state_dir of a running server or client. Stop that one, or choose "
                "another directory."
            ) from None
        _end_group(pid_file)
        with open(log, "ab") as file:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        pid_file.write_text(str(process.pid))
        try:
            yield process
        finally:
            _end_group(pid_file)
            process.wait()


def exit_on_sigterm() -> None:
    """Make a plain `kill` of this process run its clean-up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def runs_command(pid: str, word: str) -> bool:
    """Whether the process with this id is alive and has `word` in its command."""
    ps = ["ps", "-ww", "-o", "stat=", "-o", "command=", "-p", pid]
    found = subprocess.run(ps, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    return word in found and not found.startswith("Z")  # a dead process is listed until its parent reads its exit code


def _end_group(pid_file: Path) -> None:
    """End Flower's processes in the group that the file names; any other process that has this group id now is spared."""
    if not pid_file.exists():
        return
    group, asked = pid_file.read_text(), set[int]()
    deadline = time.monotonic() + _END_SECONDS
    while members := _find_members(group):
        late = time.monotonic() > deadline
        for pid in members if late else members - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked |= members
        time.sleep(0.1)
    pid_file.unlink()


def _find_members(group: str) -> set[int]:
    ps = ["ps", "-A", "-ww", "-o", "pgid=", "-o", "pid=", "-o", "stat=", "-o", "command="]
    listed = subprocess.run(ps, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    found = set()
    for line in listed.splitlines():
        pgid, pid, state, command = [*line.split(None, 3), ""][:4]
        if pgid == group and state[0] != "Z" and any(word in command for word in _FLOWER_COMMANDS):
            found.add(int(pid))
    return found
