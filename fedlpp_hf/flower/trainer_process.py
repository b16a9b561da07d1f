# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The process that keeps a client's trainer between tasks: `python -m fedlpp_hf.flower.trainer_process SETTINGS BASE`,
or the same under `accelerate launch`.

It holds base, Trainer and data, and answers on a Unix socket. Only its user can open the socket, and a caller must know
the key in a file that only this user can read.
"""

import argparse
import contextlib
import gc
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

from ..processes import local_socket
from ..report.json_log import log_to_file
from .client_settings import ClientSettings
from .client_trainer import answer_sum, describe_trainer, make_client_trainer, name_answer, train_task
from .errors import describe_error
from .process_group import is_alive


logger = logging.getLogger(__name__)


class TrainerService:
    """Answers `status`, `train`, `sum` and `stop` on the client's socket. Training runs in the thread that calls [`serve`]."""

    def __init__(self, settings: ClientSettings, trainer: Any):
        self.settings, self.trainer = settings, trainer
        self.key = local_socket.read_key(settings.key_file)
        self._jobs: queue.Queue[tuple[Callable[[], bytes], queue.Queue] | None] = queue.Queue()

    def serve(self) -> None:
        """Serve until `stop`, or until the parent process has ended."""
        self.settings.pid_file.write_text(str(os.getpid()))
        with local_socket.listen(self.settings.socket_file) as listener:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            try:
                while self.settings.parent is None or is_alive(self.settings.parent):
                    with contextlib.suppress(queue.Empty):
                        job = self._jobs.get(timeout=1.0)
                        if job is None:
                            break
                        work, answers = job
                        answers.put(self._do(work))
                self.trainer.share("stop")
            finally:
                self.settings.pid_file.unlink(missing_ok=True)

    def _do(self, work: Callable[[], bytes]) -> tuple[dict[str, Any], bytes]:
        try:
            return {"answer": name_answer(self.trainer)}, work()
        except Exception as error:
            return {"error": describe_error(error, logger)}, b""

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            request, payload = local_socket.receive_request(connection, self.key)
            answer: tuple[dict[str, Any], bytes] = describe_trainer(self.trainer), b""
            work = {
                "train": lambda: train_task(self.trainer, payload),
                "sum": lambda: answer_sum(self.trainer, request["client"], request["step"], payload),
            }.get(request["command"])
            if work is not None:
                answers: queue.Queue = queue.Queue()
                self._jobs.put((work, answers))
                answer = answers.get()
            if request["command"] == "stop":
                self._jobs.put(None)
            local_socket.send(connection, *answer)


def main(argv: list[str] | None = None) -> None:
    """Be the trainer of one client until stopped."""
    parser = argparse.ArgumentParser(prog="python -m fedlpp_hf.flower.trainer_process", description=main.__doc__)
    parser.add_argument("settings", help="the client.json that `fedlpp-hf client` wrote")
    parser.add_argument("base", help="directory of the quantized base")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    settings = ClientSettings.read(args.settings)
    trainer = make_client_trainer(settings, args.base)
    # What lives long is frozen, else the `gc.collect()` in accelerate's `free_memory` walks all of it in every task.
    gc.collect()
    gc.freeze()
    if trainer.is_world_process_zero():
        with log_to_file(trainer.args.log_json, trainer.args) if trainer.args.log_json else contextlib.nullcontext():
            TrainerService(settings, trainer).serve()
    else:
        trainer.follow()
    trainer.end()  # a rank whose process group nobody destroyed can abort while it exits


if __name__ == "__main__":
    main()
