# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Processes beside this one that answer requests: messages of safetensors and JSON over a pipe, and no pickle comes back."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import patch_environment

from ..wire.encoding import Payload, decode_message, encode_message


# What `accelerate launch` and `torchrun` tell a worker. These processes are no workers of theirs.
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)

Answer = tuple[dict[str, Any], Payload]


class Service:
    """A spawned process with a handler, `make_handler(setup, scratch)`: a request names one of its methods.

    A method takes the request's tensors and its JSON arguments by name, and returns (JSON values, tensors); `scratch` is
    a directory that ends with the process. `environment` is set in the process from its very beginning, before it imports
    anything.

    Raises:
        ValueError: if `setup` can't be sent there; from [`receive`], if the handler rejected its input with one.
        RuntimeError: from [`send`] and [`receive`], if the process died or failed unexpectedly.
    """

    def __init__(
        self,
        name: str,
        make_handler: Callable[[Any, Path], Any],
        setup: Any,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self.name, self.environment = name, environment
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, name, make_handler, setup), name=f"fedlpp-{name}", daemon=True
        )
        try:
            with patch_environment(**environment):  # what is spawned inside begins with it
                self._process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"The {name}'s process can't be given what it needs ({error}). Define compute_metrics, collators and the "
                "trainer's class at the top level of a module or of your script."
            ) from error
        child.close()
        self._command = ""
        # Left to the interpreter's exit, the process would be killed, and what it holds would leak.
        self._finalizer = weakref.finalize(self, _end, self.pipe, self._process)

    def ask(self, command: str, tensors: Mapping[str, torch.Tensor] | None = None, **arguments: Any) -> Answer:
        """[`send`] and [`receive`]."""
        self.send(command, tensors, **arguments)
        return self.receive()

    def send(self, command: str, tensors: Mapping[str, torch.Tensor] | None = None, **arguments: Any) -> None:
        """Send a request; `pipe` can be read once there is an answer."""
        self._command = command
        try:
            self.pipe.send_bytes(
                encode_message("request", {"command": command, "arguments": arguments}, tensors or {})
            )
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Answer:
        """Wait for the answer to the last request."""
        try:
            header, payload = decode_message("answer", self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death() from error
        if header["error"] is not None:
            kind, text = header["error"]
            raise (ValueError if kind == "ValueError" else RuntimeError)(f"The {self.name}'s process: {text}")
        return header["answer"], payload

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self._finalizer()

    def kill(self) -> None:
        """End the process though it does not listen."""
        self._process.kill()
        self._finalizer()

    def _death(self) -> RuntimeError:
        self._process.join(timeout=5)
        return RuntimeError(
            f"The {self.name}'s process died during `{self._command}` (exit code {self._process.exitcode}). Its own "
            "messages are above. The rounds that are committed are safe: correct the cause and resume."
        )


def _end(pipe, process) -> None:
    pipe.close()  # the process ends when its pipe does
    process.join(timeout=10)
    if process.is_alive():
        process.kill()
        process.join()


def _serve(pipe, name: str, make_handler: Callable[[Any, Path], Any], setup: Any) -> None:
    # ^C reaches the whole process group; the process that asks decides what it means and then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for variable in _LAUNCHER_VARIABLES:
        os.environ.pop(variable, None)
    with tempfile.TemporaryDirectory(prefix=f"fedlpp-{name}-") as scratch:
        handler = make_handler(setup, Path(scratch))
        while True:
            try:
                request, payload = decode_message("request", pipe.recv_bytes())
            except (EOFError, OSError):
                return
            answer: dict[str, Any] = {}
            tensors: Mapping[str, torch.Tensor] = {}
            error = None
            try:
                answer, tensors = getattr(handler, request["command"])(payload, **request["arguments"])
            except Exception as exception:
                sys.excepthook(type(exception), exception, exception.__traceback__)
                error = [type(exception).__name__, f"{type(exception).__name__}: {exception}"]
            pipe.send_bytes(encode_message("answer", {"answer": answer, "error": error}, tensors))
