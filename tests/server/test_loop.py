# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The round loop on adapters alone: sampling, windows of broadcasts, and what is not accepted from a client."""

import dataclasses
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from fedlpp_hf import FederatedConfig, FederatedServer
from fedlpp_hf.wire.messages import ClientFailure, ClientUpdate, restore_tensors


KEY_A, KEY_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
CLIENTS = {"a": 10, "b": 20, "c": 30}


def make_server(output_dir, num_examples=CLIENTS, **options):
    adapter = {KEY_A: torch.arange(8.0).view(2, 4) / 8, KEY_B: torch.zeros(4, 2)}
    args = FederatedConfig(str(output_dir), use_cpu=True, **{"num_rounds": 2, "adapter_bits": 32, **options})
    return FederatedServer(args, adapter, LoraConfig(r=2, target_modules=["q"]), num_examples, "fingerprint")


def answer(task, value=1.0, **changes):
    delta = {KEY_A: torch.full((2, 4), value), KEY_B: torch.full((4, 2), value)}
    update = ClientUpdate(
        task.federation_id,
        task.round,
        task.client_id,
        task.base_fingerprint,
        CLIENTS.get(task.client_id, 1),
        delta,
        {"loss": 1.0, "steps": 1},
    )
    return dataclasses.replace(update, **changes)


def answer_all(tasks):
    return [answer(task) for task in tasks]


def test_sampling_depends_on_seed_and_round_alone(tmp_path):
    clients = {f"client-{number}": 1 for number in range(50)}
    first, again, other = (
        make_server(tmp_path / str(n), clients, clients_per_round=5, num_clients=50, seed=seed)
        for n, seed in enumerate((1, 1, 2))
    )
    assert first.sample_clients(3) == again.sample_clients(3)
    assert first.sample_clients(3) != first.sample_clients(4)
    assert first.sample_clients(3) != other.sample_clients(3)
    drawn = [client for number in range(200) for client in first.sample_clients(number)]
    assert all(len(set(first.sample_clients(number))) == 5 for number in range(20))
    assert min(drawn.count(client) for client in clients) > 5  # uniform: 20 expected


def test_examples_and_uniform_weighting(tmp_path):
    def run(tasks):
        return [answer(task, float(value)) for value, task in enumerate(tasks)]

    for weighting, mean in (("examples", (0 * 10 + 1 * 20 + 2 * 30) / 60), ("uniform", 1.0)):
        server = make_server(tmp_path / weighting, weighting=weighting, num_rounds=1)
        server.run(run)
        torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), mean))


@pytest.mark.parametrize(("broadcast", "expected"), [("every_round", 6.0), ("2", 1.5 + 3.5 + 5.5), ("never", 3.5)])
def test_rounds_at_one_proxy_are_averaged(tmp_path, broadcast, expected):
    """Client updates are 1, 2, … 6 in six rounds; with every broadcast they add up, in between they are averaged."""
    sent = []

    def run(tasks):
        sent.append(None if tasks[0].proxy is None else restore_tensors(tasks[0].proxy)[KEY_B][0, 0].item())
        value = 1.0 if broadcast == "every_round" else float(tasks[0].round)
        return [answer(task, value) for task in tasks]

    server = make_server(tmp_path, broadcast=broadcast, num_rounds=6)
    server.run(run)
    torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), expected))
    assert (
        sent
        == {
            "every_round": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            "2": [0.0, 0.0, 1.5, 1.5, 5.0, 5.0],
            "never": [None] * 6,
        }[broadcast]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"round": 9}, "its round is 9"),
        ({"federation_id": "another"}, "its federation_id"),
        ({"base_fingerprint": "another"}, "its base_fingerprint"),
        ({"metrics": {"steps": 1}}, "lack `loss`"),
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


def read_record(server, number):
    return json.loads((server.store.round_dir(number) / "round.json").read_text())


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


def test_order_of_arrival_does_not_matter(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = {client: torch.randn(1, generator=generator).item() for client in CLIENTS}
    forward, backward = make_server(tmp_path / "f"), make_server(tmp_path / "b")
    forward.run(lambda tasks: [answer(task, values[task.client_id]) for task in tasks])
    backward.run(lambda tasks: [answer(task, values[task.client_id]) for task in reversed(tasks)])
    for key, value in forward.adapter.items():
        assert torch.equal(value, backward.adapter[key])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_updates_leave_nothing_behind(tmp_path):
    """Neither files, nor what is open or mapped of deleted ones, which would hold their room on the disk."""

    def is_open(_=None):
        held = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        return any(str(tmp_path) in text for text in (*held, Path("/proc/self/maps").read_text()))

    opened = []
    server = make_server(tmp_path, num_rounds=2)
    server.on_round = lambda record: opened.append(is_open())
    server.run(answer_all)
    assert opened == [False, True, True]  # while a round is committed, its updates are there
    assert not is_open()
    assert not server.store.updates_dir.exists()


def test_all_clients_failing_fails(tmp_path):
    server = make_server(tmp_path)
    with pytest.raises(RuntimeError, match="0 acceptable updates; min_clients=1"):
        server.run(lambda tasks: [])
    assert server.store.latest() == 0


def test_a_longer_federation_may_resume_a_shorter_one(tmp_path):
    make_server(tmp_path, num_rounds=1).run(answer_all)
    longer = make_server(tmp_path, num_rounds=3)
    records = longer.run(answer_all, resume=True)
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    torch.testing.assert_close(longer.adapter[KEY_B], torch.full((4, 2), 3.0))


def test_tasks_of_a_round_differ_in_client_and_seed_alone(tmp_path):
    seen = []

    def run(tasks):
        seen.append(tasks)
        return answer_all(tasks)

    make_server(tmp_path, adapter_bits=4).run(run)
    for tasks in seen:
        assert len({task.seed for task in tasks}) == 3
        assert len({dataclasses.replace(task, client_id="", seed=0).to_bytes() for task in tasks}) == 1


def test_a_clients_rank_may_change_between_rounds(tmp_path):
    class Growing(FederatedServer):
        def rank_of(self, client, number):
            return number if client == "a" else 0

    seen = []

    def run(tasks):
        for task in tasks:
            rank = task.options.rank or 2
            seen.append((task.client_id, task.proxy[KEY_A].shape[0], task.proxy[KEY_B].shape[1]))
            yield answer(task, delta={KEY_A: torch.ones(rank, 4), KEY_B: torch.ones(4, rank)})

    server = make_server(tmp_path, weighting="uniform")
    server.__class__ = Growing
    server.run(run)
    assert [ranks for client, *ranks in seen if client == "a"] == [[1, 1], [2, 2]]
    # In round 1 the client of rank 1 did not move the second row and column.
    torch.testing.assert_close(server.adapter[KEY_B], torch.tensor([[2.0, 1 + 2 / 3]]).expand(4, 2))


def test_clients_of_one_rank_share_a_proxy(tmp_path):
    """Ten thousand clients of two ranks take the memory of two proxies."""
    server = make_server(tmp_path, num_rounds=1, aggregation="exact", client_ranks={"a": 1, "b": 1})
    seen = {}

    def run(tasks):
        seen.update({task.client_id: task.proxy for task in tasks})
        for task in tasks:
            rank = task.options.rank or 2
            yield answer(task, delta={KEY_A: torch.ones(rank, 4), KEY_B: torch.ones(4, rank)})

    server.run(run)
    assert seen["a"] is seen["b"] is not seen["c"]


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_adaptive_server_optimizer_steps_by_its_learning_rate(tmp_path, name):
    """In the first round each of FedOpt's rules moves by lr·m/(√v + τ) ≈ lr·(1 − β₁)/√(1 − β₂) or lr·(1 − β₁), whatever Δ."""
    moved = []
    for value in (1.0, 100.0):
        server = make_server(
            tmp_path / f"{value}", num_rounds=1, server_optimizer=name, server_learning_rate=0.1, server_tau=1e-6
        )
        server.run(lambda tasks, value=value: [answer(task, value) for task in tasks])
        moved.append(server.adapter[KEY_B])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=0)
    assert 0.005 < float(moved[0].mean()) < 0.2


def test_stopped_before_the_first_commit_begins_anew(tmp_path, monkeypatch):
    server = make_server(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(server.store, "commit", lambda *values: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            server.run(answer_all)
    resumed = make_server(tmp_path)
    resumed.run(answer_all, resume=True)
    torch.testing.assert_close(resumed.adapter[KEY_B], torch.full((4, 2), 2.0))
