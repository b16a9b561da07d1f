# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The gate in front of Flower's SuperLink."""

import asyncio
import contextlib
import http.client
import socket
import sys

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from fedlpp_hf.flower.environment import make_environment
from fedlpp_hf.flower.process_group import run_group
from fedlpp_hf.flower.server_command import wait_for_port
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
        asyncio.run(FleetOnly(app)(scope, None, send))
        return sent[0]["status"]

    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
        assert ask(path, "127.0.0.1") == 200
        assert ask(path, "192.0.2.1") == 403
    assert ask("/v1/fleet/pull-messages", "192.0.2.1") == 200


def test_gate_stands_in_front_of_a_real_superlink(tmp_path):
    """Flower's own code decides whether the gate is asked; another version may not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))  # sends nothing
        except OSError:
            pytest.skip("this machine has no other address than loopback")
        address = probe.getsockname()[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def ask(host, path):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path)
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
