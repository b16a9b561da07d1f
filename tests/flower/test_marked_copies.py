# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower that sends each client its own marked copy of the base, with the processes that users start."""

from pathlib import Path

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.base.mark_keys import MarkKey
from fedlpp_hf.base.marking import trace_base
from tests.flower.machines import Machines
from tests.helpers import CLIENTS


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]


def test_leaked_copy_is_traced_to_its_client(tmp_path, write_config, rows, wide_llama):
    clients = CLIENTS[:2]
    options = {"join_timeout": 400, "lost_timeout": 60, "round_timeout": 300, "base": None, "merge": False}
    config = write_config(num_clients=2, num_rounds=1, mark_key=str(tmp_path / "marks.json"), **options)
    machines = Machines(tmp_path, config, rows, ["--full_model", str(wide_llama)])
    machines.prepare_keys(clients)
    try:
        server = machines.start_server()
        machines.wait_for("server/registered/site-1.pub", server)
        for client in clients:
            machines.start_client(client)
        assert server.wait() == 0
    finally:
        machines.stop()
    assert [record["rejected"] for record in RoundStore(tmp_path / "out").records()] == [{}, {}]
    key = MarkKey.read(tmp_path / "marks.json")
    assert sorted(key.clients) == clients
    for client in clients:
        (leaked,) = (tmp_path / f"cache-{client}").iterdir()
        found = trace_base(leaked, key)
        assert [trace.client for trace in found if trace.false_alarm < 1e-6] == [client]
        assert found[0].correlation > 0.99
    assert not [t for t in trace_base(tmp_path / "out" / "_federation" / "base", key) if t.false_alarm < 1e-6]
