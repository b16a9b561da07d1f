# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The gate in front of Flower's SuperLink, and the addresses on which it listens."""

import asyncio
import contextlib
import http.client
import socket
import sys

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.flower import server_command
from fedlpp_hf.flower.certificates import make_node_key
from fedlpp_hf.flower.environment import make_environment
from fedlpp_hf.flower.process_group import run_group
from fedlpp_hf.flower.server_command import run_server, wait_for_port
from fedlpp_hf.flower.superlink import FleetOnly


pytestmark = pytest.mark.integration


def test_other_machines_reach_the_fleet_api_alone():
    def ask(path, host):
        sent = []

        async def app(scope, receive, send):
            sent.append({"status": 200})

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "client": (host, 1)}
        asyncio.run(FleetOnly(app, trust=True)(scope, None, send))
        return sent[0]["status"]

    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
        assert ask(path, "127.0.0.1") == 200
        assert ask(path, "192.0.2.1") == 403
    assert ask("/v1/fleet/pull-messages", "192.0.2.1") == 200


def test_own_address_of_a_single_interface_is_local():
    """A server that does not listen on loopback is controlled from there, and from nowhere else."""

    def ask(client, one_interface):
        sent = []

        async def app(scope, receive, send):
            sent.append({"status": 200})

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": "/v1/control/start-run", "client": (client, 1), "server": ("192.0.2.7", 8000)}
        asyncio.run(FleetOnly(app, one_interface, trust=True)(scope, None, send))
        return sent[0]["status"]

    assert ask("192.0.2.7", True) == 200
    assert ask("192.0.2.1", True) == ask("192.0.2.7", False) == 403


def find_address():
    """An address of this machine beside loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))  # sends nothing
        except OSError:
            pytest.skip("this machine has no other address than loopback")
        return probe.getsockname()[0]


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_gate_stands_in_front_of_a_real_superlink(tmp_path):
    """Flower's own code decides whether the gate is asked; another version may not."""
    address, port = find_address(), find_port()

    def ask(host, path, body=b""):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            return connection.getresponse().status

    command = [
        sys.executable,
        "-m",
        "fedlpp_hf.flower.superlink",
        "--insecure",
        "--host",
        "0.0.0.0",
        "--port",
        str(port),
    ]
    command += ["--database", str(tmp_path / "superlink.db")]
    with run_group(command, make_environment(tmp_path), tmp_path / "log", tmp_path / "superlink.pid") as superlink:
        wait_for_port(port, superlink, tmp_path / "log")
        for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/"):
            assert ask(address, path) == 403
            assert ask("127.0.0.1", path) != 403
        assert ask(address, "/v1/fleet/pull-messages") != 403
        # The limits of what clients send stand in front of it, too.
        assert ask(address, "/v1/fleet/push-object", b"x" * 100_000) == 413
        assert ask(address, "/v1/fleet/push-messages", b"\xff") == 400


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "listen", ["interface", *(pytest.param(address, marks=slow) for address in ("::1", "::", "0.0.0.0", "localhost"))]
)
def test_server_starts_on_any_of_its_addresses(tmp_path, monkeypatch, capsys, listen):
    """It is looked for where it listens, and the Control API registers a client there, over TLS."""
    listen = find_address() if listen == "interface" else listen
    if ":" in listen:
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind((listen, 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
    (tmp_path / "federation.yaml").touch()
    make_node_key(tmp_path / "client")
    (tmp_path / "client" / "node.pub").rename(tmp_path / "client" / "site.pub")
    monkeypatch.setattr(server_command, "run_app", lambda state, environment: 7)
    options = {"client_keys": str(tmp_path / "client"), "hosts": ["fl.example.org"], "port": find_port()}
    assert (
        run_server(str(tmp_path / "federation.yaml"), state_dir=str(tmp_path / "state"), listen=listen, **options) == 7
    )
    assert (tmp_path / "state" / "registered" / "site.pub").is_file()
    assert f"--server fl.example.org:{options['port']}" in capsys.readouterr().out


def test_port_of_another_process_is_refused(tmp_path):
    (tmp_path / "federation.yaml").touch()
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ValueError, match="choose another --port"):
        options = {"client_keys": str(tmp_path), "port": other.getsockname()[1]}
        run_server(str(tmp_path / "federation.yaml"), state_dir=str(tmp_path / "state"), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"listen": "0.0.0.0"}, "Give --hosts"),
        ({"listen": "192.0.2.254", "hosts": ["a.org"]}, "expected an address of this machine"),
        ({"listen": "127.0.0.1:9000"}, "[Ss]et --port 9000"),
        ({"hosts": ["a.org:9000"]}, "[Ss]et --port 9000"),
        ({"hosts": ["fl.example.org"], "insecure": True}, "only loopback"),
        ({"client_keys": "absent"}, "is not a directory"),
        ({}, "--client_keys is not given"),
        ({"client_keys": ".", "insecure": True}, "no node shows its key"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, message):
    (tmp_path / "federation.yaml").touch()
    with pytest.raises(ValueError, match=message):
        run_server(str(tmp_path / "federation.yaml"), state_dir=str(tmp_path / "state"), **options)
    assert not (tmp_path / "state").exists()
