# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Requests between processes of one user, over a Unix socket that no other user can open, to callers who know a key."""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..tensors.atomic import write_atomically


CALL_TIMEOUT = 30.0  # for requests that are answered at once; a busy machine is slow
_KEY_BYTES = _NONCE_BYTES = 32
_MAX_FRAME_BYTES = 1 << 34
_MAX_HEADER_BYTES = 1 << 28  # JSON, which takes many times its size
_MAX_PATH_BYTES = 100  # macOS takes 103, Linux 107

Frame = tuple[dict[str, Any], bytes]


def make_key(path: Path) -> None:
    """Write a new key to `path`, readable by this user only, unless there is a whole one."""
    if not path.exists() or path.stat().st_size != _KEY_BYTES:
        write_atomically(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)


def read_key(path: Path) -> bytes:
    """Read the key that [`make_key`] wrote.

    Raises:
        RuntimeError: if other users can read it.
        EOFError: if it is not whole; the next [`make_key`] makes a new one.
    """
    if path.stat().st_mode & 0o077:
        raise RuntimeError(
            f"`{path}` can be read by others; its mode must be 600. Delete it, and the next start makes a new one."
        )
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise EOFError(f"`{path}` has {len(key)} bytes instead of {_KEY_BYTES}.")
    return key


def find_private_directory() -> Path:
    """The directory for sockets, which only this user can open.

    Raises:
        RuntimeError: if the directory exists and belongs to, or is open to, others.
    """
    parent = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    directory = Path(parent) / f"fedlpp-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RuntimeError(
            f"`{directory}` is for the trainer's socket and must belong to this user alone (mode 700). Remove it, or set "
            "XDG_RUNTIME_DIR to a private directory."
        )
    return directory


@contextlib.contextmanager
def listen(path: Path) -> Iterator[socket.socket]:
    """Listen at `path`, which only this user can open, and remove it afterwards."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        try:
            with _shorten(path) as address:
                listener.bind(address)
        finally:
            os.umask(before)
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def receive_request(connection: socket.socket, key: bytes) -> Frame:
    """Receive a request, after the caller has proved that it knows the key.

    Raises:
        EOFError: if the caller does not know it, or closes the connection early.
    """
    connection.settimeout(CALL_TIMEOUT)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(nonce)
    proof = _receive_exactly(connection, hashlib.sha256().digest_size)
    if not hmac.compare_digest(proof, hmac.digest(key, nonce, "sha256")):
        raise EOFError("The caller does not know the key.")
    return _receive(connection)


def call(path: Path, key: bytes, header: dict[str, Any], payload: bytes, timeout: float) -> Frame:
    """Send a request and return its answer.

    Args:
        path: of the socket.
        key: known to both sides.
        header: JSON values.
        payload: bytes.
        timeout: seconds to wait for the answer.

    Raises:
        OSError: if nobody listens, or the answer takes too long (TimeoutError).
        EOFError: if the connection ends early.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CALL_TIMEOUT)
        with _shorten(path) as address:
            connection.connect(address)
        connection.sendall(hmac.digest(key, _receive_exactly(connection, _NONCE_BYTES), "sha256"))
        send(connection, header, payload)
        connection.settimeout(timeout)
        return _receive(connection)


def send(connection: socket.socket, header: dict[str, Any], payload: bytes) -> None:
    """Send JSON values and bytes."""
    head = json.dumps(header).encode()
    connection.sendall(struct.pack("<QQ", len(head), len(payload)) + head)
    if payload:
        connection.sendall(payload)


@contextlib.contextmanager
def _shorten(path: Path) -> Iterator[str]:
    """A name of `path` that is short enough for a socket: through a link to its folder, if need be."""
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="fedlpp-") as directory:  # this user's alone
        link = Path(directory) / "to"
        link.symlink_to(path.parent.absolute())
        yield str(link / path.name)


def _receive(connection: socket.socket) -> Frame:
    sizes = struct.unpack("<QQ", _receive_exactly(connection, 16))
    if sizes[0] > _MAX_HEADER_BYTES or sizes[1] > _MAX_FRAME_BYTES:
        raise EOFError("The header announces more bytes than any message has.")
    try:
        header = json.loads(_receive_exactly(connection, sizes[0]))
    except (ValueError, RecursionError) as error:
        raise EOFError(f"The header is no JSON ({error}).") from None
    if not isinstance(header, dict):
        raise EOFError(f"The header is a {type(header).__name__}; expected a mapping.")
    return header, _receive_exactly(connection, sizes[1])


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("The connection ended early.")
        data += part
    return bytes(data)
