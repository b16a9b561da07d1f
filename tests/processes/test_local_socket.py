# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The socket between processes of one user: who can open it, who is heard, and what it does with garbage."""

import socket
import stat
import struct
import threading
from pathlib import Path

import pytest

from fedlpp_hf.processes import local_socket
from fedlpp_hf.processes.local_socket import (
    call,
    find_private_directory,
    listen,
    make_key,
    read_key,
    receive_request,
    send,
)


def answer_one(listener, key, heard):
    connection, _ = listener.accept()
    with connection:
        try:
            heard.append(receive_request(connection, key))
            send(connection, {"well": True}, b"data")
        except EOFError as error:
            heard.append(error)


@pytest.fixture
def call_with(tmp_path):
    """A function that listens with one key, calls with another, and returns (what was heard, the answer or the error)."""

    def run(ours: bytes, theirs: bytes, path: Path):
        heard: list = []
        with listen(path) as listener:
            thread = threading.Thread(target=answer_one, args=(listener, ours, heard))
            thread.start()
            try:
                answer = call(path, theirs, {"command": "x"}, b"payload", timeout=30)
            except (OSError, EOFError) as error:
                answer = error
            thread.join()
        return heard[0], answer

    return run


def test_request_and_answer(call_with, tmp_path):
    heard, answer = call_with(b"k" * 32, b"k" * 32, tmp_path / "s")
    assert heard == ({"command": "x"}, b"payload") and answer == ({"well": True}, b"data")
    assert not (tmp_path / "s").exists()


def test_path_longer_than_a_sockets_name(call_with, tmp_path):
    directory = tmp_path / ("long" * 30) / ("longer" * 20)
    directory.mkdir(parents=True)
    heard, answer = call_with(b"k" * 32, b"k" * 32, directory / "control.sock")
    assert heard == ({"command": "x"}, b"payload") and answer == ({"well": True}, b"data")


def test_wrong_key_is_not_heard(call_with, tmp_path):
    heard, answer = call_with(b"k" * 32, b"j" * 32, tmp_path / "s")
    assert isinstance(heard, EOFError) and "does not know the key" in str(heard)
    assert isinstance(answer, (OSError, EOFError))


def test_socket_and_key_are_this_users_alone(tmp_path):
    make_key(tmp_path / "key")
    with listen(tmp_path / "s"):
        for name in ("key", "s"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    key = read_key(tmp_path / "key")
    make_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key and len(key) == 32
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(RuntimeError, match="can be read by others; its mode must be 600"):
        read_key(tmp_path / "key")


def test_directory_that_others_can_enter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    find_private_directory().chmod(0o755)
    with pytest.raises(RuntimeError, match="must belong to this user alone"):
        find_private_directory()


def test_announced_sizes_are_bounded(tmp_path):
    """Nothing is set aside for bytes that were announced and do not come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<QQ", 2**40, 0))
        with pytest.raises(EOFError, match="announces more bytes"):
            local_socket._receive(ours)


@pytest.mark.parametrize("header", [b"[" * 100_000, b"{", b"[1]", b"\xff", b"9" * 5000], ids=lambda header: header[:5])
def test_headers_that_are_no_mapping_end_the_connection(header):
    """Whoever calls, and whoever answers a call, hears of it in one way."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<QQ", len(header), 0) + header)
        with pytest.raises(EOFError, match="The header is"):
            local_socket._receive(ours)


def test_headers_are_bounded():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<QQ", 2**29, 0))
        with pytest.raises(EOFError, match="announces more bytes"):
            local_socket._receive(ours)
