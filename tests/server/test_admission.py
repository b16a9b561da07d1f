# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What is not accepted from a client: it is rejected by name, and the round goes on."""

import dataclasses
import math
import struct

import pytest
import torch

from fedlpp_hf.server.admission import check_clients
from fedlpp_hf.wire.messages import ClientFailure, ClientUpdate

from .small_server import KEY_A, KEY_B, answer, answer_all, make_server, read_record


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"round": 9}, "its round is 9"),
        ({"federation_id": "another"}, "its federation_id"),
        ({"base_fingerprint": "another"}, "its base_fingerprint"),
        ({"metrics": {"steps": 1}}, "have no `loss`"),
        ({"num_examples": 0}, "claims 0 examples"),
        ({"num_examples": -3}, "claims -3 examples"),
        ({"num_examples": 10**12}, "expected 1 to 10"),
        ({"metrics": {"loss": 1.0, "steps": 0}}, "claims 0 steps"),
        ({"metrics": {"loss": 1.0, "steps": math.nan}}, "claims nan steps"),
        ({"metrics": {"loss": 1.0, "steps": math.inf}}, "claims inf steps"),
        ({"delta": {KEY_A: torch.ones(2, 4)}}, "missing"),
        (
            {"delta": {KEY_A: torch.ones(2, 4), KEY_B: torch.ones(4, 2), "input_ids": torch.ones(2)}},
            "unknown: input_ids",
        ),
        ({"delta": {KEY_A: torch.ones(2, 5), KEY_B: torch.ones(4, 2)}}, "shape"),
        ({"delta": {KEY_A: torch.ones(2, 4).byte(), KEY_B: torch.ones(4, 2)}}, "torch.uint8; expected a floating"),
        ({"delta": {KEY_A: torch.full((2, 4), 99.0), KEY_B: torch.ones(4, 2)}}, "its norm is 280; at most 50"),
        ({"delta": {KEY_A: torch.full((2, 4), torch.nan), KEY_B: torch.ones(4, 2)}}, "NaN"),
        ({"delta": {KEY_A: torch.ones(2, 4), KEY_B: torch.full((4, 2), torch.inf)}}, "infinite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_rejected_by_name_and_the_round_goes_on(tmp_path, change, reason):
    def run(tasks):
        return [answer(task, **(change if task.client_id == "a" else {})) for task in tasks]

    server = make_server(tmp_path, num_rounds=1, max_update_norm=50.0)
    server.run(run)
    record = read_record(server, 1)
    assert reason in record["rejected"]["a"]
    assert list(record["clients"]) == ["b", "c"]
    assert torch.equal(server.adapter[KEY_B], torch.ones(4, 2))


DAMAGE = {
    "truncated": (lambda data: data[:-1], "no message"),
    "nothing": (lambda data: b"", "0 bytes is truncated"),
    "trailing bytes": (lambda data: data + b"\0", "no message"),
    "a header of terabytes": (lambda data: struct.pack("<Q", 2**42) + data[8:], "claims more than there is"),
    "a changed value": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum is wrong"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_message_is_rejected_by_name_and_the_round_goes_on(tmp_path, damage):
    change, reason = DAMAGE[damage]

    def run(tasks):
        """What a transport does with bytes."""
        for task in tasks:
            data = answer(task).to_bytes()
            try:
                yield ClientUpdate.from_bytes(change(data) if task.client_id == "a" else data)
            except ValueError as error:
                yield ClientFailure(task.client_id, str(error))

    server = make_server(tmp_path / "goes on", num_rounds=1)
    server.run(run)
    record = read_record(server, 1)
    assert reason in record["rejected"]["a"] and list(record["clients"]) == ["b", "c"]
    with pytest.raises(RuntimeError, match="2 acceptable updates; min_clients=3. a: .*are committed"):
        make_server(tmp_path / "fails", min_clients=3).run(run)


def test_strangers_doubles_failures_and_silence(tmp_path):
    def run(tasks):
        a, b, _ = tasks
        yield answer(b)
        yield answer(b, 100.0)
        yield answer(dataclasses.replace(a, client_id="stranger"))
        yield ClientFailure("a", "its machine caught fire")

    server = make_server(tmp_path, num_rounds=1)
    (_, record) = server.run(run)
    assert record["rejected"] == {
        "a": "its machine caught fire",
        "b": "it answered twice",
        "c": "it did not answer",
        "stranger": "it was not asked in this round",
    }
    assert torch.equal(server.adapter[KEY_B], torch.ones(4, 2))


def test_updates_of_an_earlier_round_are_not_replayed(tmp_path):
    first = []

    def run(tasks):
        first.extend(answer_all(tasks) if not first else [])
        return first

    with pytest.raises(RuntimeError, match="Round 2 has 0 acceptable updates.*its round is 1"):
        make_server(tmp_path).run(run)


def test_clients_are_timed_from_the_begin_of_their_runs(tmp_path, monkeypatch):
    """Where a run begins elsewhere, from the moment the tasks went out; who did not answer has no time."""
    now = [100.0]
    monkeypatch.setattr("fedlpp_hf.server.admission.time.perf_counter", lambda: now[0])

    def run(tasks):
        now[0] += 2
        yield answer(tasks[0])
        server.admission.begin("b")
        now[0] += 3
        yield ClientFailure("b", "it failed")
        now[0] += 1
        yield ClientFailure("stranger", "it failed")

    server = make_server(tmp_path, num_rounds=1, min_clients=1)
    server.run(run)
    costs = read_record(server, 1)["traffic"]
    assert {client: cost["seconds"] for client, cost in costs.items()} == {"a": 2, "b": 3, "c": None}
    assert costs["a"]["bytes_up"] > 0 and costs["b"]["bytes_up"] == costs["c"]["bytes_up"] == 0
    assert min(cost["bytes_down"] for cost in costs.values()) > 0


@pytest.mark.parametrize(
    "clients",
    [
        *({"a": 1, "b": count} for count in ("many", math.nan, 10**18, -1, True, [1], 1.0)),
        {"\ud800": 1},
        {"": 1},
        {5: 1},
    ],
    ids=repr,
)
def test_clients_that_could_not_be_stored_or_weighed_are_refused_at_the_start(clients):
    """They were written into federation.json, and broke every resume, or made one update the whole mean."""
    with pytest.raises(ValueError, match="is no client id|rows; expected a number"):
        check_clients(clients)
    check_clients({"a": 0, "b": None, "klinik-ä": 2**53})
