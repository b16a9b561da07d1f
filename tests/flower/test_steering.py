# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower, watched and steered by its owner's commands; the clients stay connected while it is paused."""

import json
import time
import urllib.request
from pathlib import Path

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.cli.main import main
from fedlpp_hf.processes.control import ask
from fedlpp_hf.tensors.adapters import read_adapter
from tests.flower.machines import Machines
from tests.helpers import CLIENTS, assert_equal, find_free_port, run_in_process


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]
PAUSE_SECONDS = 5


@pytest.mark.timeout(1200)
def test_paused_and_stopped(tmp_path, write_config, rows, llama_base, capsys):
    """The bits are those of one process that ran as many rounds."""
    clients = CLIENTS[:2]
    config = write_config(
        num_clients=2, min_clients=2, num_rounds=2, join_timeout=500, lost_timeout=60, round_timeout=300
    )
    machines, port = Machines(tmp_path, config, rows), find_free_port()
    machines.prepare_keys(clients)
    root, log = tmp_path / "out" / "_federation", tmp_path / "server.jsonl"
    watching = ["--monitor_port", str(port), "--log_json", str(log)]

    def wait_for(server, **expected):
        while True:
            seen = ask(root, "status", timeout=60) if root.is_dir() else None
            if seen is not None and all(seen[name] == value for name, value in expected.items()):
                return seen
            assert server.poll() is None, "the server ended early"
            time.sleep(0.1)

    try:
        server = machines.start_server(*watching)
        machines.wait_for("server/registered/site-1.pub", server)
        seen = wait_for(server, phase="joining")
        assert seen["here"] == [] and seen["num_clients"] == 2
        assert ask(root, "pause") == {"round": None}
        for client in clients:
            machines.start_client(client, "--base", str(llama_base), "--log_json", str(tmp_path / f"{client}.jsonl"))
        seen = wait_for(server, phase="paused")
        assert seen["here"] == sorted(clients) and seen["rows"].keys() == set(clients)
        time.sleep(PAUSE_SECONDS)
        seen = wait_for(server, phase="paused")
        assert seen["here"] == sorted(clients) and seen["committed"] == 0
        main(["status", str(tmp_path / "out")])
        assert "paused; 0 of 2 rounds committed" in capsys.readouterr().out
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
        assert "fedlpp_clients_connected 2\n" in metrics and str(tmp_path) not in metrics
        with pytest.raises(ValueError, match="round 1 would ask 1; min_clients=2"):
            ask(root, "drop", client=clients[0])
        assert ask(root, "resume")["round"] == 1
        seen = wait_for(server, phase="round")
        assert ask(root, "stop") == {"round": 1}
        assert server.wait() == 0
    finally:
        machines.stop()

    assert RoundStore(tmp_path / "out").latest() == 1
    flags = ["--num_rounds", "1"]
    alone = run_in_process(config, rows, tmp_path / "process", flags=flags, clients=clients)
    assert_equal(read_adapter(tmp_path / "out")[0], alone)
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    assert any(message.startswith("Clients: ") for message in messages)  # of the logger that the ServerApp prints
    assert "The owner's command: stop" in messages
    assert all((tmp_path / f"{client}.jsonl").is_file() for client in clients)
