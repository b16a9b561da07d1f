# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower with a client's machine and a server that die."""

import os
import signal
from pathlib import Path

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import CLIENTS, assert_equal, run_in_process


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]


def test_machine_and_server_that_die(make_machines, tmp_path):
    """In round 1 a client's machine is unplugged; in round 2 the server dies, after an update has arrived and before the
    commit. It resumes to the bits of one process without that client."""
    machines = make_machines(num_rounds=2, lost_timeout=30)
    server = machines.start_server()
    clients = [machines.start_client(client) for client in CLIENTS]

    machines.wait_for_round(0, server)
    clients[2].kill()
    clients[2].wait()  # else its trainer would find it still listed
    os.killpg(machines.read_pid("site-2/supernode.pid"), signal.SIGKILL)
    machines.wait_for_round(1, server)
    machines.wait_for("out/_federation/updates/00000.safetensors", server)
    server.kill()
    os.kill(machines.read_pid("server/server.pid"), signal.SIGKILL)
    assert RoundStore(tmp_path / "out").latest() == 1
    assert machines.start_server("--resume_from_checkpoint", "true").wait() == 0

    records = RoundStore(tmp_path / "out").records()
    assert [sorted(record["rejected"]) for record in records] == [[], ["site-2"], ["site-2"]]
    assert records[1]["rejected"]["site-2"] == "it showed no sign of life for 30 s"
    assert records[2]["rejected"]["site-2"] == "it is not connected"
    assert all("eval_accuracy" in record["metrics"]["server"] for record in records)
    failures = [(1, "site-2"), (2, "site-2")]
    reference = run_in_process(machines.config, machines.rows, tmp_path / "process", failures, machines.overrides)
    assert_equal(read_adapter(tmp_path / "out")[0], reference)
    assert (tmp_path / "out" / "_merged" / "model.safetensors").is_file()
    assert clients[0].poll() is clients[1].poll() is None
    assert sorted(RoundStore(tmp_path / "out").read()["clients"]) == CLIENTS
