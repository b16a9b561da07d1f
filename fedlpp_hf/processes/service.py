# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Processes beside this one that answer requests: messages of safetensors and JSON over a socket, and no pickle comes back."""

import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cloudpickle
import torch

from ..tensors.scratch import sweep
from ..wire.encoding import Payload, decode_message, encode_message
from .child import BOOTSTRAP, scratch_prefix


Answer = tuple[dict[str, Any], Payload]


class Service:
    """A process with a handler, `make_handler(setup, scratch)`: a request names one of its methods.

    A method takes the request's tensors and its JSON arguments by name, and returns (JSON values, tensors); `scratch` is
    a directory that ends with the process.

    Args:
        name: What errors call the process.
        make_handler: Makes the handler, in the process.
        setup: Goes there by cloudpickle: what `__main__` defines travels by value.
        environment: Set in the process from its very beginning, before it imports anything.

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
        try:
            data = cloudpickle.dumps((name, make_handler, setup))
        except Exception as error:  # whatever an object's own `__reduce__` raises
            raise ValueError(
                f"The {name}'s process can't be given what it needs ({type(error).__name__}: {error}). Something that "
                "compute_metrics, a collator, a callback, the trainer's class or the rows refer to can't be pickled: a lock, an open "
                "file, a generator? Make it inside the function that uses it."
            ) from error
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(environment),
                pass_fds=[theirs.fileno()],
            )
        self.pipe = Connection(ours.detach())
        self._command, self._sent = "start", False
        # Left to the interpreter's exit, the process would be killed, and what it holds would leak.
        self._finalizer = weakref.finalize(self, _end, self.pipe, self._process, name)
        try:
            self.pipe.send_bytes(data)
        except OSError as error:
            raise self._death() from error

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
            self._check_start()
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

    def _check_start(self) -> None:
        """The process's first word says whether it could read its setup."""
        if self._sent:
            return
        problem = json.loads(self.pipe.recv_bytes())
        self._sent = True
        if problem is not None:
            raise ValueError(
                f"The {self.name}'s process can't read what it was given ({problem}). Is a module of yours, which "
                "compute_metrics, a collator or the trainer's class comes from, on its path?"
            )

    def _death(self) -> RuntimeError:
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none yet"
        return RuntimeError(
            f"The {self.name}'s process died during `{self._command}` (exit code {code}). Its own messages are above. The "
            "rounds that are committed are safe: correct the cause and resume."
        )


def _end(pipe: Connection, process: subprocess.Popen, name: str) -> None:
    pipe.close()  # the process ends when its pipe does
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode:  # it could not tidy up
        sweep(scratch_prefix(name))
