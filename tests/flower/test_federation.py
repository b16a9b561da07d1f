# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whole federations over Flower, with the processes that users start."""

from pathlib import Path

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.flower.loading import load_rows, load_trainer
from fedlpp_hf.tensors.adapters import read_adapter
from tests.flower.machines import Machines
from tests.helpers import CLIENTS, assert_equal, run_in_process


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]


def test_equals_in_process(tmp_path, write_config, rows, llama_base):
    """TLS, node keys, warm trainers; one client is sent the base, and one has a copy. In the end nothing is left running."""
    clients = CLIENTS[:2]
    config = write_config(num_clients=2, num_rounds=2, join_timeout=200, lost_timeout=60, round_timeout=200)
    machines = Machines(tmp_path, config, rows)
    machines.prepare_keys(clients)
    try:
        server = machines.start_server()
        machines.wait_for("server/registered/site-1.pub", server)  # an earlier start would be in vain
        machines.start_client("site-0")
        machines.start_client("site-1", "--base", str(llama_base))
        machines.wait_for_round(1, server)
        running = machines.find_processes()
        assert server.wait() == 0
    finally:
        machines.stop()

    commands = [" ".join(command) for command, _ in running.values()]
    for name in ("superlink", "supernode", "superexec", "trainer_process"):
        assert any(f"fedlpp_hf.flower.{name}" in command for command in commands), name
    assert any("flwr-serverapp" in command for command in commands)
    assert {environment["FLWR_TELEMETRY_ENABLED"] for _, environment in running.values()} == {"0"}
    assert {environment["FLWR_DISABLE_UPDATE_CHECK"] for _, environment in running.values()} == {"1"}
    assert not any("--allow-runtime-dependency-installation" in command for command in commands)
    assert list((tmp_path / "cache-site-0").iterdir()) and not (tmp_path / "cache-site-1").exists()
    records = RoundStore(tmp_path / "out").records()
    assert [record["rejected"] for record in records] == [{}, {}, {}]
    assert_equal(
        read_adapter(tmp_path / "out")[0], run_in_process(config, rows, tmp_path / "process", clients=clients)
    )


@pytest.mark.slow
def test_server_fails_with_its_run(tmp_path, write_config, rows):
    """`flwr run --stream` returned 0 for such a run."""
    machines = Machines(tmp_path, write_config(join_timeout=0.1), rows, server_options=["--insecure"])
    server = machines.start_server()
    assert server.wait(timeout=280) == 1
    log = (tmp_path / "server-0.log").read_text()
    assert "finished:failed" in log and "0 of 3 clients joined" in log
    machines.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_secure_sum_equals_that_in_process(tmp_path, write_config, rows, llama_base):
    """Keys, shares, masked updates and openings through Flower's processes; clients have each other's keys."""
    pytest.importorskip("Crypto", reason="needs the extra [privacy]")
    options = {"secure_aggregation": True, "secure_threshold": 0.5, "clip_update_norm": 1.0, "num_rounds": 1}
    config = write_config(join_timeout=700, lost_timeout=60, round_timeout=600, **options)
    machines = Machines(tmp_path, config, rows)
    machines.prepare_keys(CLIENTS)
    try:
        server = machines.start_server()
        machines.wait_for("server/registered/site-2.pub", server)
        for client in CLIENTS:
            machines.start_client(client, "--base", str(llama_base), "--peer_keys", "keys")
        assert server.wait() == 0
    finally:
        machines.stop()
    (record,) = RoundStore(tmp_path / "out").records()[1:]
    assert record["rejected"] == {} and record["clients"] == {client: {"num_examples": None} for client in CLIENTS}
    assert (record["sum"]["members"], record["sum"]["threshold"], record["sum"]["losses"]) == (3, 2, 3)
    datasets = {client: load_rows(rows / f"{client}.jsonl") for client in CLIENTS}
    trainer, _ = load_trainer(config, ["--output_dir", str(tmp_path / "process")], model=None, train_dataset=datasets)
    trainer.train()
    assert_equal(read_adapter(tmp_path / "out")[0], read_adapter(tmp_path / "process")[0])
    assert all((tmp_path / client / "sums.json").exists() for client in CLIENTS)
