# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Secure aggregation over Flower: the sum of the federation in one process, and clients that are not lied to."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.flower.client_trainer import answer_sum, make_client_trainer, train_task
from fedlpp_hf.flower.errors import SayableError
from fedlpp_hf.privacy import noise_shares
from fedlpp_hf.privacy.secure_sums.client import SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.server import SumServer
from fedlpp_hf.privacy.secure_sums.terms import SumTerms
from fedlpp_hf.wire.messages import ClientUpdate
from tests.helpers import CLIENTS, assert_equal, load_rows, load_trainer, read_adapter


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")
pytest.importorskip("Crypto", reason="needs the extra [privacy]")

from fedlpp_hf.flower.grid_requests import SUM, TRAIN
from fedlpp_hf.flower.sums import limit_sum
from tests.flower.network import Network, rejected, run_over


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("warm_trainers")]
SECURE = {"secure_aggregation": True, "secure_threshold": 0.5, "clip_update_norm": 1.0, "round_timeout": 200}


def run_here(config, rows, output_dir, clients=CLIENTS, flags=()):
    """The federation of `config` with `clients` in this process."""
    datasets = {client: load_rows(rows / f"{client}.jsonl") for client in clients}
    flags = ["--output_dir", str(output_dir), *flags]
    trainer, _ = load_trainer(config, flags, model=None, train_dataset=datasets)
    trainer.train()
    return read_adapter(output_dir)[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"broadcast": "never"}], ids=str)
def test_equals_in_process(tmp_path, write_config, rows, llama_base, options):
    config = write_config(num_rounds=2, **SECURE | options)
    network = Network(tmp_path, config, rows)
    over_flower = run_over(network, config, tmp_path / "flower", llama_base)
    assert_equal(over_flower, run_here(config, rows, tmp_path / "process"))
    records = RoundStore(tmp_path / "flower").records()
    assert [record["rejected"] for record in records] == [{}, {}, {}]
    kinds = [kind for kind, _ in network.asked if kind in (TRAIN, SUM)]
    assert kinds == ([TRAIN] * 3 + [SUM] * 12) * 2  # 4 steps with 3 clients
    assert network.updates == [None] * len(network.updates)  # no message has had a plain update
    # Neither rows nor losses of single clients have come to the server.
    federation = json.loads((tmp_path / "flower" / "_federation" / "federation.json").read_text())
    assert federation["clients"] == dict.fromkeys(CLIENTS)
    assert records[2]["clients"] == {client: {"num_examples": None} for client in CLIENTS}


@pytest.mark.slow
@pytest.mark.parametrize("silent", [True, False], ids=["without the noise itself", "noise"])
def test_noise_in_shares(tmp_path, write_config, rows, llama_base, monkeypatch, caplog, silent):
    """It comes from the server's tasks: the clients' own configuration has no noise. The server adds none."""
    options = {"noise_multiplier": 3.0, "target_delta": 0.01, "aggregation": "freeze_a", "clip_update_norm": 0.05}
    config = write_config(num_rounds=2, **SECURE | options)
    if silent:
        monkeypatch.setattr(noise_shares, "draw_skellam", lambda variance, count, read: np.zeros(count, np.int64))
    network = Network(tmp_path, config, rows)
    with caplog.at_level("INFO"):
        over_flower = run_over(network, config, tmp_path / "flower", llama_base)
    records = RoundStore(tmp_path / "flower").records()
    here = run_here(config, rows, tmp_path / "process")
    if silent:
        assert_equal(over_flower, here)
    else:
        key = max(here, key=lambda name: "lora_B" in name)
        assert (over_flower[key] != here[key]).float().mean() > 0.9
    assert [record["rejected"] for record in records] == [{}, {}, {}]
    assert [record["privacy"]["releases"] for record in records[1:]] == [1, 2]
    spent = records[2]["privacy"]["epsilon"]
    assert spent == RoundStore(tmp_path / "process").records()[2]["privacy"]["epsilon"]
    lines = [
        line.message
        for line in caplog.records
        if "the 2 sums of this federation that may have it spend" in line.message
    ]
    assert len(lines) == 3 and all(f"ε = {spent:.3f} at δ = 0.01" in line for line in lines)
    assert network.updates == [None] * len(network.updates)


@pytest.mark.slow
def test_clients_that_drop_out_are_not_in_the_sum(tmp_path, write_config, rows, llama_base):
    """One does not answer when it should mask; of three with a threshold of two the others open the sum."""
    config = write_config(num_rounds=1, **SECURE)

    def fail(client, message):
        content = message.content["fedlpp_hf"]
        return "offline" if client == "site-1" and content.get("step") == "shares" else None

    network = Network(tmp_path, config, rows, fault=fail)
    run_over(network, config, tmp_path / "flower", llama_base)
    (record,) = RoundStore(tmp_path / "flower").records()[1:]
    assert list(record["clients"]) == ["site-0", "site-2"]
    assert record["rejected"] == {"site-1": "it showed no sign of life for 0 s"}
    assert (record["sum"]["members"], record["sum"]["losses"]) == (3, 2)


@pytest.mark.slow
def test_too_few_stop_the_federation_and_open_nothing(tmp_path, write_config, rows, llama_base, monkeypatch):
    monkeypatch.setattr("fedlpp_hf.privacy.secure_sums.server.combine_shares", None)  # it is not called
    config = write_config(num_rounds=1, **SECURE)

    def fail(client, message):
        return "offline" if client != "site-0" and message.content["fedlpp_hf"].get("step") == "opening" else None

    network = Network(tmp_path, config, rows, fault=fail)
    with pytest.raises(RuntimeError, match="Round 1 has 0 acceptable updates.*1 of 3 clients sent their shares"):
        run_over(network, config, tmp_path / "flower", llama_base)


@pytest.mark.parametrize(("here", "there"), [(True, False), pytest.param(False, True, marks=pytest.mark.slow)])
def test_both_sides_must_want_it(tmp_path, write_config, rows, llama_base, here, there):
    config = write_config(join_timeout=2, **SECURE | {"secure_aggregation": there})
    network = Network(tmp_path, config, rows)
    message = f"it runs with secure_aggregation={there}, and this server with secure_aggregation={here}"
    with pytest.raises(RuntimeError, match=message):
        run_over(network, config, tmp_path / "flower", llama_base, "--secure_aggregation", str(here))


@pytest.mark.slow
def test_task_never_makes_a_client_send_its_update(tmp_path, write_config, rows, llama_base, warm_trainers):
    """A server that sends plain tasks gets keys, and later nothing, since the client's own options decide."""
    config = write_config(num_rounds=1, **SECURE)
    network = Network(tmp_path, config, rows)
    run_over(network, config, tmp_path / "flower", llama_base)
    trainer = warm_trainers[network.settings[1].state_dir]
    task = find_task(trainer, "site-0")
    keys = train_task(trainer, task)
    with pytest.raises(ValueError, match="Expected a update"):
        ClientUpdate.from_bytes(keys)
    with pytest.raises(SayableError, match="the server asks for the opening before the roster"):
        answer_sum(trainer, "site-0", "opening", b"")


def find_task(trainer, client):
    """A task of the trainer's last round, as the server would send it again."""
    return replace(trainer.guard.task, client_id=client).to_bytes()


@pytest.mark.slow
def test_restarted_client_opens_nothing(tmp_path, write_config, rows, llama_base, warm_trainers, monkeypatch):
    """Its secrets were in memory alone. The server can't get a share of the round that it was in."""
    config = write_config(num_rounds=1, **SECURE)
    restarted = []

    def restart(client, message):
        if client == "site-1" and message.content["fedlpp_hf"].get("step") == "opening":
            settings = network.settings[2]
            del warm_trainers[settings.state_dir]
            restarted.append(client)

    network = Network(tmp_path, config, rows, fault=restart)
    run_over(network, config, tmp_path / "flower", llama_base)
    assert restarted
    (record,) = RoundStore(tmp_path / "flower").records()[1:]
    assert list(record["clients"]) == CLIENTS  # its update was in the sum, which the other two opened


def test_longest_answers_are_within_the_limit():
    """What a client seals for 29 others, whose ids have 100 characters of twelve bytes."""
    terms = SumTerms("f" * 16, 1, 1.0, 0.5, 4, "0" * 64)
    server, clients = SumServer(terms), {}
    for number in range(30):
        name = f"{number:02d}" + "\U0001f98e" * 98
        clients[name] = SumClient(terms, name, Contribution(np.zeros(4, np.float32), 1.0, 1))
        server.add_keys(name, clients[name].advertise())
    sealed = [clients[name].answer("roster", request) for name, request in server.make_rosters().items()]
    assert max(map(len, sealed)) < limit_sum(0, 30)
    assert limit_sum(10**6, 3) == 10**6


def test_cold_trainers_are_refused(settings, write_config, rows, llama_base):
    settings = replace(settings, config=str(write_config(**SECURE)), data=str(rows / "site-0.jsonl"), warm=False)
    with pytest.raises(ValueError, match="secure_aggregation=True with --cold"):
        make_client_trainer(settings, llama_base)


@pytest.mark.slow
def test_replayed_round_is_opened_for_the_same_survivors_alone(tmp_path, write_config, rows, llama_base):
    """The server restarts after it opened a round, without its notes, and now it says that one client dropped out."""
    config = write_config(num_rounds=1, **SECURE)
    lying = []

    def lose(client, message):
        return (
            "offline"
            if lying and client == "site-2" and message.content["fedlpp_hf"].get("step") == "shares"
            else None
        )

    network = Network(tmp_path, config, rows, fault=lose)
    run_over(network, config, tmp_path / "flower", llama_base)
    forget_round(tmp_path / "flower")
    lying.append(True)
    resume = ("--resume_from_checkpoint", "True")
    with pytest.raises(
        RuntimeError, match="Round 1 has 0.*site-0: this client has helped to open round 1 for other survivors"
    ):
        run_over(network, config, tmp_path / "flower", llama_base, *resume)
    lying.clear()
    network.offline.clear()
    run_over(network, config, tmp_path / "flower", llama_base, *resume)
    assert rejected(tmp_path / "flower", 1) == {}


def forget_round(output_dir):
    (RoundStore(output_dir).round_dir(1) / "round.json").unlink()
