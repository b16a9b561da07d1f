# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower with a trainer that is killed, a network that is down, and a stranger."""

import os
import signal
from pathlib import Path

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter
from tests.flower.machines import Wire
from tests.helpers import CLIENTS, assert_equal, run_in_process


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.flower.certificates import make_node_key


pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]

CUT_SECONDS = 70.0  # Flower waits 30 s for an answer, and 30 s more for that of a new connection


def test_outage_and_killed_trainer_cost_nobody_the_round(make_machines, tmp_path):
    """In round 1 a trainer is killed and another client's network is down for a while. A fourth machine made its own key
    and takes no part in any of it."""
    machines = make_machines(num_rounds=1, lost_timeout=90)
    make_node_key(tmp_path / "intruder")
    wire = Wire(machines.port)
    server = machines.start_server()
    intruder = machines.start_client("intruder")
    clients = [machines.start_client(client, port=wire.port if client == "site-1" else None) for client in CLIENTS]

    machines.wait_for_round(0, server)
    wire.cut(CUT_SECONDS)
    trainer = machines.read_pid("site-0/trainer.pid")
    os.kill(trainer, signal.SIGKILL)
    machines.wait_for_round(1, server)
    assert machines.read_pid("site-0/trainer.pid") != trainer
    assert server.wait() == 0

    records = RoundStore(tmp_path / "out").records()
    assert [record["rejected"] for record in records] == [{}, {}]
    assert records[1]["seconds"] > CUT_SECONDS - 1
    assert all("eval_accuracy" in record["metrics"]["server"] for record in records)
    reference = run_in_process(machines.config, machines.rows, tmp_path / "process", flags=machines.overrides)
    assert_equal(read_adapter(tmp_path / "out")[0], reference)
    assert all(client.poll() is None for client in clients)
    assert sorted(RoundStore(tmp_path / "out").read()["clients"]) == CLIENTS
    assert intruder.poll() is None  # it tries again and again, and was sent nothing
    assert "SuperNode ended with code" in (tmp_path / "client-1.log").read_text()
    assert not any((tmp_path / "cache-intruder").glob("*"))
