# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Reach the trainer of this machine's client: start it on demand, ask it, stop it.

Flower starts a process for every message. Loading a base in each of them would dominate a round, so a trainer stays
(see `trainer_process.py`). The short-lived ClientApp imports this module; nothing here may import torch.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..processes import local_socket
from ..processes.local_socket import CALL_TIMEOUT
from .base_transfer import read_fingerprint
from .client_settings import ClientSettings
from .errors import SayableError
from .process_group import runs_command


TRAINER = "fedlpp_hf.flower.trainer_process"  # the module that the trainer's process runs


def ask_trainer(
    settings: ClientSettings,
    base_dir: str | os.PathLike,
    command: str,
    payload: bytes = b"",
    timeout: float = CALL_TIMEOUT,
    about: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], bytes]:
    """Ask the local trainer, after starting one if none is running or the running one has another base.

    If the trainer dies during a task, a new one repeats the task once, which gives the same update. A trainer without an
    answer after `timeout` is killed.

    Args:
        settings: the client's.
        base_dir: directory of the base that the trainer must have.
        command: `status`, `train` or `sum`.
        payload: the bytes of the task, for `train`, or of the server's message, for `sum`.
        timeout: seconds to wait for the answer.
        about: the `client` and the `step`, for `sum`.

    Raises:
        RuntimeError: if the trainer can't be started, dies twice, does not answer in time, or reports an error.
    """
    for last_attempt in (False, True):
        status = ensure_trainer(settings, base_dir)
        try:
            answer, data = call_trainer(settings, command, payload, timeout, about)
        except TimeoutError as error:
            os.kill(status["pid"], signal.SIGKILL)
            raise SayableError(
                f"the client's trainer did not answer within {timeout:.0f} s and was killed."
            ) from error
        except (OSError, EOFError) as error:
            if last_attempt:
                raise RuntimeError(
                    f"The client's trainer died twice during one task. {_read_log_end(settings)}"
                ) from error
            continue
        if "error" in answer:
            raise SayableError(f"the client's trainer: {answer['error']}")
        return answer, data
    raise AssertionError("unreachable")


def ensure_trainer(settings: ClientSettings, base_dir: str | os.PathLike) -> dict[str, Any]:
    """Start the trainer unless it is running with this base, and return its status.

    Raises:
        RuntimeError: if it does not start; the message ends with the last lines of its log.
    """
    fingerprint = read_fingerprint(base_dir)
    with _lock(settings.lock_file):
        status = find_trainer(settings)
        if status is not None and status["base"] == fingerprint:
            return status
        stop_trainer(settings)  # one with another base, or one that is running but does not answer
        local_socket.make_key(settings.key_file)
        launch = settings.launch or [sys.executable]
        with open(settings.log_file, "ab") as log:
            process = subprocess.Popen(
                [*launch, "-m", TRAINER, str(settings.write()), str(base_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it outlives the ClientApp that started it
            )
        deadline = time.monotonic() + settings.start_timeout
        while time.monotonic() < deadline:
            if (status := find_trainer(settings)) is not None:
                return status
            if process.poll() is not None:
                raise RuntimeError(f"The client's trainer did not start. {_read_log_end(settings)}")
            time.sleep(0.1)
        process.kill()
    raise SayableError(f"the client's trainer was not ready within {settings.start_timeout:.0f} s.")


def stop_trainer(settings: ClientSettings) -> None:
    """End the running trainer, if any: ask it to stop; kill it if it does not answer or is still training."""
    try:
        pid = settings.pid_file.read_text()
    except FileNotFoundError:
        return
    patience = CALL_TIMEOUT
    try:
        call_trainer(settings, "stop", b"", CALL_TIMEOUT)
    except (OSError, EOFError):
        patience = 0.0
    deadline = time.monotonic() + patience
    # Wait for the process itself, because its memory is needed. By now another process may have its id: check the command.
    while runs_command(pid, TRAINER):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
    settings.pid_file.unlink(missing_ok=True)


def find_trainer(settings: ClientSettings) -> dict[str, Any] | None:
    """The status of the running trainer, or None if there is none or it does not answer."""
    try:
        return call_trainer(settings, "status", b"", CALL_TIMEOUT)[0]
    except (OSError, EOFError):
        return None


def call_trainer(
    settings: ClientSettings, command: str, payload: bytes, timeout: float, about: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], bytes]:
    """Ask the running trainer and return its answer.

    Args:
        settings: the client's.
        command: `status`, `train`, `sum` or `stop`.
        payload: as for [`ask_trainer`].
        timeout: seconds to wait for the answer.
        about: as for [`ask_trainer`].

    Raises:
        OSError: if no trainer is running, or it does not answer in time (TimeoutError).
        EOFError: if it ends before it has answered.
    """
    key = local_socket.read_key(settings.key_file)
    return local_socket.call(settings.socket_file, key, {"command": command, **(about or {})}, payload, timeout)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_log_end(settings: ClientSettings) -> str:
    lines = settings.log_file.read_text(errors="replace").splitlines()[-3:]
    return "The end of its log: " + " | ".join(lines)
