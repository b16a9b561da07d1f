# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Commands to the process that runs a federation: who is answered, and with what."""

import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from fedlpp_hf.processes import local_socket
from fedlpp_hf.processes.control import KEY_FILE, SOCKET_FILE, answer_commands, ask


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "out" / "_federation"


def handle(request):
    if request["command"] == "refuse":
        raise ValueError("not now")
    if request["command"] == "fail":
        raise KeyError("inner")
    return {"heard": request, "thread": threading.current_thread() is not threading.main_thread()}


def test_answers_and_refusals(directory):
    with answer_commands(directory, handle):
        assert ask(directory, "status", value=[1, None]) == {
            "heard": {"command": "status", "value": [1, None]}, "thread": True
        }  # fmt: skip
        with pytest.raises(ValueError, match="^not now$"):
            ask(directory, "refuse")
        with pytest.raises(ValueError, match="The command failed .KeyError"):
            ask(directory, "fail")
        assert ask(directory, "status")  # goes on
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for name in (KEY_FILE, SOCKET_FILE):
            assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600, name
    assert ask(directory, "status") is None


def test_no_process_is_none(directory):
    assert ask(directory, "status") is None
    directory.mkdir(parents=True)
    local_socket.make_key(directory / KEY_FILE)
    with socket.socket(socket.AF_UNIX) as killed:  # which has left its socket
        os.chdir(directory)
        killed.bind(SOCKET_FILE)
    assert (directory / SOCKET_FILE).exists() and ask(directory, "status") is None
    with answer_commands(directory, handle):
        assert ask(directory, "status")


def test_wrong_key_is_refused(directory):
    with answer_commands(directory, handle):
        key = (directory / KEY_FILE).read_bytes()
        (directory / KEY_FILE).write_bytes(bytes(32))
        with pytest.raises(RuntimeError, match="hung up.*Is `control.key` that of this run"):
            ask(directory, "status")
        (directory / KEY_FILE).write_bytes(key)
        assert ask(directory, "status")


@pytest.mark.skipif(os.getuid() == 0, reason="root opens everything")
def test_directory_without_access_is_a_clear_error(directory):
    with answer_commands(directory, handle):
        directory.chmod(0)
        try:
            with pytest.raises(RuntimeError, match="is another user's"):
                ask(directory, "status")
        finally:
            directory.chmod(0o700)


STRANGER = f"""
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
directory = int(sys.argv[1])
refused = []
for name, attempt in (
    ("directory", lambda: os.fchdir(directory)),
    ("key", lambda: open("{KEY_FILE}", "rb").read()),
    ("socket", lambda: socket.socket(socket.AF_UNIX).connect("{SOCKET_FILE}")),
):
    try:
        attempt()
    except PermissionError:
        refused.append(name)
print(*refused)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("mode, refused", [(0o700, "directory"), (0o755, "key socket")])
def test_another_user_gets_nowhere(directory, mode, refused):
    """Not even with the directory at hand, or where an earlier version left it open."""
    with answer_commands(directory, handle):
        directory.chmod(mode)
        opened = os.open(directory, os.O_RDONLY)
        command = [sys.executable, "-c", STRANGER, str(opened)]
        try:
            found = subprocess.run(
                command, cwd=directory, pass_fds=[opened], capture_output=True, text=True, timeout=60
            )
        finally:
            os.close(opened)
    assert found.stdout.split()[: len(refused.split())] == refused.split(), found


def test_callers_that_say_nothing_keep_nobody_waiting(directory):
    with answer_commands(directory, handle):
        silent = []
        for _ in range(5):
            connection = socket.socket(socket.AF_UNIX)
            with local_socket._shorten(directory / SOCKET_FILE) as address:
                connection.connect(address)
            silent.append(connection)
        assert ask(directory, "status", timeout=10)
        silent[0].sendall(b"x" * 5000)  # no proof of the key
        assert ask(directory, "status", timeout=10)
        for connection in silent:
            connection.close()


def test_one_process_answers_for_a_directory(directory):
    with answer_commands(directory, handle):
        refused = pytest.raises(ValueError, match="Another process is running a federation in")
        with refused, answer_commands(directory, handle):
            pass
        assert ask(directory, "status")  # the first one goes on
    with answer_commands(directory, handle):
        assert ask(directory, "status")


def test_place_without_sockets_is_a_warning(directory, monkeypatch, caplog):
    def fail(path):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(local_socket, "listen", fail)
    with answer_commands(directory, handle):
        assert ask(directory, "status") is None
    assert "No command reaches this process" in caplog.text


def test_nothing_heavy_is_imported():
    """`fedlpp-hf status` comes at once."""
    code = "import sys, fedlpp_hf.processes.control, fedlpp_hf.report.status, fedlpp_hf.server.store; print(sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    ).stdout
    assert not {"torch", "numpy", "transformers", "peft", "safetensors.torch"} & set(eval(found))
