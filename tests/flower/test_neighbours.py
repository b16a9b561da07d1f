# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Other users of the owner's machine, and of a client's, reach none of Flower's local APIs."""

import asyncio
import contextlib
import http.client
import json
import os
import pwd
import socket
import struct
import sys
import time
from functools import partial

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.flower import neighbours
from fedlpp_hf.flower.environment import make_environment
from fedlpp_hf.flower.neighbours import (
    OwnUserOnly,
    choose_trust,
    find_peer_user,
    identifies_users,
    list_other_users,
)
from fedlpp_hf.flower.process_group import run_group
from fedlpp_hf.flower.server_command import wait_for_port
from fedlpp_hf.flower.superlink import FleetOnly


NOBODY = 65534
linux = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux's /proc/net/tcp")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user as well")


def be_another_user(work):
    """What `work` returns in a process of another user, as JSON."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(theirs, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def ask(port, path, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, b"", dict(headers))
        return connection.getresponse().status


@contextlib.contextmanager
def connect(family, address):
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as client:
            yield client


@pytest.fixture(params=["netlink", "tables"])
def source(request, monkeypatch):
    """Either of the two ways to ask the kernel, alone."""
    if request.param == "netlink":
        monkeypatch.setattr(neighbours, "_TABLES", ())
        if not identifies_users():
            pytest.skip("this kernel does not answer on netlink")
    else:
        monkeypatch.setattr(neighbours, "_ask_kernel", lambda client, server: None)


@linux
@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_kernel_says_who_connects(family, address):
    try:
        with connect(family, address) as client:
            ends = client.getsockname()[:2], client.getpeername()[:2]
            assert find_peer_user(*ends) == os.getuid()
            assert find_peer_user((ends[0][0], 1), ends[1]) is None
            if family == socket.AF_INET:  # as a server on `::` has it
                assert find_peer_user((f"::ffff:{address}", ends[0][1]), ends[1]) == os.getuid()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert find_peer_user(*ends) is None  # it is closed
    assert identifies_users()


@linux
@pytest.mark.usefixtures("source")
def test_listener_and_what_its_process_has_closed_are_nobodys():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert find_peer_user(address, ("127.0.0.1", 1)) is None  # the kernel falls back to the listener
        client = socket.create_connection(address)
        ends = client.getsockname(), address
        connection, _ = listener.accept()
        with connection:
            client.close()  # it waits for the other side's end
            assert find_peer_user(*ends) is None
        assert find_peer_user(*ends) is None


@pytest.mark.parametrize(
    ("change", "user"),
    [
        ({}, 1000),
        ({"state": 10}, None),  # a listener
        ({"inode": 0}, None),  # closed by its process: the kernel says user 0, who may be the owner
        ({"port": 8001}, None),  # another socket
        ({"family": socket.AF_INET6}, None),
        ({"kind": 2}, None),  # an error
    ],
)
def test_answer_is_of_the_very_socket(change, user):
    found = {"state": 1, "inode": 7, "port": 8000, "family": socket.AF_INET, "kind": 20} | change
    home = socket.inet_aton("127.0.0.1")
    answer = struct.pack("=IHHII", 88, found["kind"], 0, 1, 1) + struct.pack(
        "=BBBB", found["family"], found["state"], 0, 0
    )
    answer += struct.pack("!HH16s16s", 0x1234, found["port"], home, home) + struct.pack("=Iii", 0, 3, 0)
    answer += struct.pack("=IIIII", 0, 0, 0, 1000, found["inode"])
    ends = struct.pack("!HH16s16s", 0x1234, 8000, home, home)
    assert neighbours._read_answer(answer, socket.AF_INET, ends) == user
    assert all(neighbours._read_answer(answer[:length], socket.AF_INET, ends) is None for length in range(88))


@linux
@as_root
@pytest.mark.usefixtures("source")
def test_kernel_says_that_another_user_connects():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def connect_and_wait():
            with socket.create_connection(address) as client:
                client.recv(1)
                return client.getsockname()[1]

        pid = os.fork()
        if not pid:
            try:
                be_another_user(connect_and_wait)
            finally:
                os._exit(0)
        connection, peer = listener.accept()
        with connection:
            assert find_peer_user(peer, address) == NOBODY
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("state", "inode", "user"), [("01", "7", 1000), ("04", "0", None), ("01", "0", None), ("06", "7", None)]
)
def test_socket_that_its_process_has_closed_is_nobodys(state, inode, user):
    """The kernel lists it under user 0, who may be the owner: in a container, say."""
    line = f"1: 0100007F:1234 0100007F:1F40 {state} 00000000:00000000 00:00000000 00000000 1000 0 {inode} 1 0 20 4 30 10 -1"
    assert neighbours._find_user([line], ("127.0.0.1", 0x1234), ("127.0.0.1", 8000)) == user


@pytest.mark.parametrize("make", [FleetOnly, OwnUserOnly])
@pytest.mark.parametrize(
    ("trust", "user", "status"), [(False, None, 403), (False, -1, 403), (True, None, 200), (False, 0, 200)]
)
def test_gates_ask_the_kernel(monkeypatch, make, trust, user, status):
    sent = []

    async def app(scope, receive, send):
        sent.append({"status": 200})

    async def send(message):
        sent.append(message)

    monkeypatch.setattr(
        neighbours, "find_peer_user", lambda client, server: None if user is None else os.getuid() + user
    )
    scope = {"type": "http", "path": "/v1/runtime/pull", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    asyncio.run(make(app, trust=trust)(scope, None, send))
    assert sent[0]["status"] == status


def test_machine_that_tells_no_users_apart(monkeypatch):
    monkeypatch.setattr(neighbours, "_TABLES", ("/nowhere",))
    monkeypatch.setattr(neighbours, "_ask_kernel", lambda client, server: None)
    assert not identifies_users()
    user = pwd.struct_passwd(("eve", "x", 1234, 1234, "", "/home/eve", "/bin/bash"))
    daemon = pwd.struct_passwd(("www", "x", 1235, 1235, "", "/", "/usr/sbin/nologin"))
    monkeypatch.setattr(pwd, "getpwall", lambda: [user, daemon])
    assert list_other_users() == ["eve"]
    with pytest.raises(ValueError, match=r"other users \(eve\).*--trust_local_users"):
        choose_trust(False)
    assert choose_trust(True)
    monkeypatch.setattr(pwd, "getpwall", lambda: [daemon])
    assert choose_trust(False)


@linux
@as_root
@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("side", ["superlink", "supernode"])
def test_other_users_reach_no_local_api(tmp_path, side):
    """Live: nobody's processes ask Flower's own servers, plainly and with a header that names a connection of the owner's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        f"fedlpp_hf.flower.{side}",
        "--insecure",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--database", str(tmp_path / "db")] if side == "superlink" else ["--superlink", "127.0.0.1:1"]
    paths = ["/v1/runtime/acquire-task", "/docs", "/v1/control/start-run", "/v1/control/list-runs"]
    with run_group(command, make_environment(tmp_path), tmp_path / "log", tmp_path / f"{side}.pid") as process:
        wait_for_port(port, process, tmp_path / "log")
        with socket.create_connection(("127.0.0.1", port)) as owners:
            name = f"127.0.0.1:{owners.getsockname()[1]}"
            for headers in ({}, {"X-Forwarded-For": name}, {"X-Forwarded-For": "127.0.0.1"}):
                assert [be_another_user(partial(ask, port, path, headers)) for path in paths] == [403] * len(paths)
            assert all(ask(port, path) != 403 for path in paths)

        def send_and_leave():
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"POST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                return client.getsockname()[1]

        left = [be_another_user(send_and_leave) for _ in range(20)]
        time.sleep(1)
        if side == "superlink":
            assert be_another_user(lambda: ask(port, "/v1/fleet/pull-messages")) != 403  # nodes may be other users
            log = (tmp_path / "log").read_text()
            said = [line for line in log.splitlines() if any(f"127.0.0.1:{number} " in line for number in left)]
            assert all("403" in line for line in said) and said
