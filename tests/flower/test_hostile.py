# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation of three honest clients and a hostile one, over the real protocol, with the processes that users start.

FEDLPP_HF_LONG=1 python -m pytest tests/flower/test_hostile.py      every rule is broken, and every update sent
FEDLPP_HF_LONG=6 python -m pytest tests/flower/test_hostile.py      the updates six times, most of them damaged as well
"""

import os
from pathlib import Path

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter
from tests.flower.hostile import DESCRIPTIONS, UPDATES
from tests.flower.machines import Machines
from tests.helpers import CLIENTS, assert_equal, run_in_process


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc"),
]


# Wrong descriptions before the hostile client joins, and rounds, in each of which it sends another update.
PASSES = int(os.environ.get("FEDLPP_HF_LONG", "0"))
COUNT, ROUNDS = (len(DESCRIPTIONS), PASSES * len(UPDATES) + 1) if PASSES else (8, 2)


def test_ends_with_the_bits_of_the_honest_three(tmp_path, write_config, rows, llama_base):
    """The hostile client breaks rules of Flower's protocol and of ours, joins, and sends what no client may send. Before the
    last round its key is withdrawn."""
    options = {"join_timeout": 900, "lost_timeout": 60, "round_timeout": 300}
    config = write_config(num_clients=4, min_clients=3, num_rounds=ROUNDS, **options)
    machines = Machines(tmp_path, config, rows)
    machines.prepare_keys([*CLIENTS, "evil"])
    try:
        server = machines.start_server()
        machines.wait_for("server/registered/site-2.pub", server)
        for client in CLIENTS:
            machines.start_client(client, "--base", str(llama_base))
        hostile = machines.start_hostile("evil", seed=0, count=COUNT)
        machines.wait_for_round(ROUNDS - 1, server)
        (tmp_path / "keys" / "evil.pub").unlink()
        assert server.wait() == 0
        hostile.wait(timeout=60)
    finally:
        machines.stop()

    said = (tmp_path / "hostile.log").read_text().splitlines()
    assert [line for line in said if line.startswith("refused with")] == [
        "refused with 400: in another's name",
        "refused with 400: as the server",
        "refused with 400: 500 objects",
        "refused with 413: 8 MB",
    ]
    assert sum(line.startswith("described: ") for line in said) == COUNT
    assert "announced, and never sent" in said and "joined" in said
    assert not any(line.startswith("TAKEN") for line in said)
    assert sum(line.startswith("round ") for line in said) >= ROUNDS - 1 and said[-1].startswith("the end: ")

    store = RoundStore(tmp_path / "out")
    assert [sorted(record["clients"]) for record in store.records()] == [[], *[CLIENTS] * ROUNDS]
    for record in store.records()[1:]:
        assert list(record["rejected"]) == ["evil"]
        assert record["rejected"]["evil"].isprintable() and len(record["rejected"]["evil"]) < 600
    told = [(tmp_path / name).read_text() for name in ("server-0.log", "server/superlink.log")]
    assert not any("\x1b[2J" in text or len(text) > 10**6 for text in told)
    flags = ["--num_clients", "3"]
    assert_equal(read_adapter(tmp_path / "out")[0], run_in_process(config, rows, tmp_path / "process", flags=flags))
