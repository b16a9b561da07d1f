# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The client's machine over a network: a trainer that stays, and how the short-lived ClientApp reaches it.

Flower starts a process for every message. Loading a base there each time would dominate a round, so a long-lived
trainer (`python -m fedlpp_hf.flower.trainer_process`, or the same under `accelerate launch`) holds base, Trainer and data, and answers
on a Unix socket that only its user can open, to callers who know the key in a file that only its user can read.

Nothing heavy is imported at the top: the ClientApp imports this module in every message, the trainer once.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import local_socket
from .base_transfer import read_fingerprint
from .local_socket import CALL_TIMEOUT


logger = logging.getLogger(__name__)

TRAINER = "fedlpp_hf.flower.trainer_process"  # the module that a trainer's process runs


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client's processes need to know, written by `fedlpp-hf client` as a file that SuperNode hands on.

    `launch` is the command that starts the trainer (by default this interpreter); `parent` the process whose end ends
    the trainer, too. `base` is the directory or Hub id of the client's copy of the base, where it does not come from the
    server.
    """

    config: str
    data: str
    client_id: str
    state_dir: str
    cache_dir: str
    flags: list[str] = field(default_factory=list)
    base: str | None = None
    warm: bool = True
    launch: list[str] = field(default_factory=list)
    parent: int | None = None
    start_timeout: float = 600.0

    @classmethod
    def read(cls, path: str | os.PathLike) -> "ClientSettings":
        """
        Raises:
            ValueError: if the file is missing or holds something else.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"The client's settings `{path}` can't be read ({error}); start `fedlpp-hf client`."
            ) from error

    def write(self) -> Path:
        """Write the file that [`read`] reads into `state_dir`, and return its path."""
        path = Path(self.state_dir) / "client.json"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @property
    def key_file(self) -> Path:
        return Path(self.state_dir) / "trainer.key"

    @property
    def log_file(self) -> Path:
        return Path(self.state_dir) / "trainer.log"

    @property
    def pid_file(self) -> Path:
        return Path(self.state_dir) / "trainer.pid"

    @property
    def socket_file(self) -> Path:
        # A socket's path may have about a hundred characters, and a state directory more.
        name = hashlib.sha256(str(Path(self.state_dir).resolve()).encode()).hexdigest()[:24]
        return local_socket.find_private_directory() / f"{name}.sock"


def make_client_trainer(settings: ClientSettings, base_dir: str | os.PathLike) -> Any:
    """The trainer of this client: the base in `base_dir`, the rows in `settings.data`.

    Raises:
        ValueError: if the base ships a linear layer in full precision, or the data can't be read.
    """
    from ..base.manifest import read_manifest
    from .loading import load_rows, load_trainer

    exposed = read_manifest(base_dir)["full_precision_linears"]
    if exposed:
        raise ValueError(
            f"The base in `{base_dir}` ships {len(exposed)} linear layers in full precision ({exposed[0]}); this client "
            "does not start on it. Ask the owner for a base that was exported with fewer `embedding_bits`."
        )
    # What concerns the whole federation, or leaves this machine, is none of one client's business.
    own: dict[str, Any] = {
        "output_dir": str(Path(settings.state_dir) / "trainer"),
        "full_model": None,
        "clients_per_round": None,
        "min_clients": 1,
        "compare_full_precision": False,
        "report_to": [],
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    rows = {settings.client_id: load_rows(settings.data)}
    return load_trainer(settings.config, settings.flags, model=str(base_dir), train_dataset=rows, **own)[0]


def describe_trainer(trainer: Any) -> dict[str, Any]:
    """What the server is told of this client: its ids with their numbers of rows, and its base."""
    rows = {client: len(dataset) for client, dataset in trainer.client_datasets.items()}
    return {"clients": rows, "base": trainer.guard.fingerprint, "pid": os.getpid()}


def train_task(trainer: Any, task: bytes) -> bytes:
    """One client's run: the bytes of a task in, those of an update out."""
    from ..wire.messages import ClientTask

    trainer.guard.prove_base_unmoved()
    trainer._share("train", task)  # to the other ranks under `accelerate launch`
    return trainer.train_client(ClientTask.from_bytes(task)).to_bytes()


class TrainerService:
    """Answers `status`, `train` and `stop` on the client's socket. Training runs in the thread that calls [`serve`]."""

    def __init__(self, settings: ClientSettings, trainer: Any):
        self.settings, self.trainer = settings, trainer
        self.key = local_socket.read_key(settings.key_file)
        self._jobs: queue.Queue[tuple[bytes, queue.Queue] | None] = queue.Queue()

    def serve(self) -> None:
        """Serve until `stop`, or until the parent process is gone."""
        self.settings.pid_file.write_text(str(os.getpid()))
        with local_socket.listen(self.settings.socket_file) as listener:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            try:
                while _is_alive(self.settings.parent):
                    with contextlib.suppress(queue.Empty):
                        job = self._jobs.get(timeout=1.0)
                        if job is None:
                            break
                        job[1].put(self._train(job[0]))
                self.trainer._share("stop")
            finally:
                self.settings.pid_file.unlink(missing_ok=True)

    def _train(self, task: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            return {}, train_task(self.trainer, task)
        except Exception as error:
            logger.exception("A task failed.")
            return {"error": f"{type(error).__name__}: {error}"}, b""

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener's end
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            request, payload = local_socket.receive_request(connection, self.key)
            answer: tuple[dict[str, Any], bytes] = describe_trainer(self.trainer), b""
            if request["command"] == "train":
                done: queue.Queue = queue.Queue()
                self._jobs.put((payload, done))
                answer = done.get()
            if request["command"] == "stop":
                self._jobs.put(None)
            local_socket.send(connection, *answer)


def ask_trainer(
    settings: ClientSettings,
    base_dir: str | os.PathLike,
    command: str,
    payload: bytes = b"",
    timeout: float = CALL_TIMEOUT,
) -> tuple[dict[str, Any], bytes]:
    """Ask the local trainer, started anew if there is none, or if it holds another base.

    A trainer that dies over a task is started once more, as a task's update depends on nothing else; one that does not
    answer within `timeout` seconds is ended.

    Raises:
        RuntimeError: if the trainer can't be started, or died or hung over the request, or says that it failed.
    """
    for attempt in (1, 2):
        status = ensure_trainer(settings, base_dir)
        try:
            answer, data = _call(settings, command, payload, timeout)
        except TimeoutError as error:
            os.kill(status["pid"], signal.SIGKILL)
            raise RuntimeError(f"The client's trainer did not answer within {timeout:.0f} s and was ended.") from error
        except (OSError, EOFError) as error:
            if attempt == 2:
                raise RuntimeError(f"The client's trainer died twice over one task. {_log_tail(settings)}") from error
            continue
        if "error" in answer:
            raise RuntimeError(f"The client's trainer: {answer['error']}")
        return answer, data
    raise AssertionError("unreachable")


def ensure_trainer(settings: ClientSettings, base_dir: str | os.PathLike) -> dict[str, Any]:
    """The status of the running trainer, which is started if need be.

    Raises:
        RuntimeError: if it does not start; the message ends with its last words.
    """
    fingerprint = read_fingerprint(base_dir)
    with _locked(Path(settings.state_dir) / "trainer.lock"):
        status = _status(settings)
        if status is not None and status["base"] == fingerprint:
            return status
        stop_trainer(settings)  # one with another base, or that is there but does not answer
        local_socket.make_key(settings.key_file)
        with open(settings.log_file, "ab") as log:
            process = subprocess.Popen(
                [
                    *(settings.launch or [sys.executable]),
                    "-m",
                    TRAINER,
                    str(settings.write()),
                    str(base_dir),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it outlives the ClientApp that started it
            )
        deadline = time.monotonic() + settings.start_timeout
        while time.monotonic() < deadline:
            if (status := _status(settings)) is not None:
                return status
            if process.poll() is not None:
                raise RuntimeError(f"The client's trainer did not start. {_log_tail(settings)}")
            time.sleep(0.1)
        process.kill()
    raise RuntimeError(f"The client's trainer was not ready within {settings.start_timeout:.0f} s.")


def stop_trainer(settings: ClientSettings) -> None:
    """End the running trainer, if there is one: it is asked to, and killed if it does not listen or still trains."""
    try:
        pid = settings.pid_file.read_text()
    except FileNotFoundError:
        return
    patience = CALL_TIMEOUT
    try:
        _call(settings, "stop", b"", CALL_TIMEOUT)
    except (OSError, EOFError):
        patience = 0.0
    deadline = time.monotonic() + patience
    while _runs(pid, TRAINER):  # the id may be another's by now; until its memory is free
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
    settings.pid_file.unlink(missing_ok=True)


def _call(settings: ClientSettings, command: str, payload: bytes, timeout: float) -> tuple[dict[str, Any], bytes]:
    key = local_socket.read_key(settings.key_file)
    return local_socket.call(settings.socket_file, key, {"command": command}, payload, timeout)


def _status(settings: ClientSettings) -> dict[str, Any] | None:
    try:
        return _call(settings, "status", b"", CALL_TIMEOUT)[0]
    except (OSError, EOFError):  # nobody there, or one that no longer answers
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_alive(pid: int | None) -> bool:
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _runs(pid: str, name: str) -> bool:
    ps = ["ps", "-ww", "-o", "stat=", "-o", "command=", "-p", pid]
    found = subprocess.run(ps, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    return name in found and not found.startswith("Z")  # a dead process stays listed until its parent asks for it


def _log_tail(settings: ClientSettings) -> str:
    lines = settings.log_file.read_text(errors="replace").splitlines()[-3:]
    return "Its last words: " + " | ".join(lines)


def main(argv: list[str] | None = None) -> None:
    """`python -m fedlpp_hf.flower.trainer_process SETTINGS BASE`: be the trainer of one client until stopped."""
    parser = argparse.ArgumentParser(prog="python -m fedlpp_hf.flower.trainer_process", description=main.__doc__)
    parser.add_argument("settings", help="the client.json that `fedlpp-hf client` wrote")
    parser.add_argument("base", help="directory of the quantized base")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    settings = ClientSettings.read(args.settings)
    trainer = make_client_trainer(settings, args.base)
    if trainer.is_world_process_zero():
        TrainerService(settings, trainer).serve()
    else:
        trainer._follow()


if __name__ == "__main__":
    main()
