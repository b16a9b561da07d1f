# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""No node ends, blocks or bends the server: clients answer as they like, over a Grid without processes."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fedlpp_hf.flower.loading import NetworkConfig
from fedlpp_hf.wire.messages import ClientFailure, ClientTask, limit_update
from tests.flower.hostile import DESCRIPTIONS, UPDATES, make_update
from tests.helpers import FINGERPRINT


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from flwr.supercore.task_identity import TaskIdentity

from fedlpp_hf.flower import grid_requests, guests
from fedlpp_hf.flower.base_transfer import PackedBase
from fedlpp_hf.flower.clients import FlowerClients
from fedlpp_hf.flower.grid_requests import BASE, DESCRIBE, RECORD, TRAIN


ADAPTER = {"base_model.model.layer.lora_A.weight": torch.zeros(4, 16)}


@pytest.fixture(autouse=True)
def identity():
    """What Flower's processes learn from it, and messages ask for."""
    for name in ("run_id", "task_id", "node_id"):
        setattr(TaskIdentity, name, 1)


class Crowd:
    """A Grid whose nodes answer by `answer(kind, content)`: with a record's content, an exception that reading the answer
    raises, an Event until which its upload takes, or None for silence."""

    def __init__(self, nodes):
        self.nodes = nodes
        self.since, self.keys = dict.fromkeys(nodes, "the start"), {node: str(node).encode() for node in nodes}
        self.box, self.asked = {}, []

    def get_nodes(self):
        return [
            SimpleNamespace(
                node_id=node,
                last_activated_at=self.since[node],
                online_until=time.time() + 60,
                public_key=self.keys[node],
            )
            for node in self.nodes
        ]

    def push_messages(self, messages):
        (message,) = messages
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        identity = f"m{len(self.asked)}"
        self.asked.append((kind, node))
        answer = self.nodes[node](kind, dict(message.content.config_records[RECORD]))
        if answer is not None:
            self.box[identity] = answer
        return [identity]

    def pull_messages(self, identities):
        found = []
        for identity in identities:
            answer = self.box.pop(identity, None)
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, threading.Event):
                answer.wait()
            elif answer is not None:
                found.append(
                    SimpleNamespace(
                        metadata=SimpleNamespace(reply_to_message_id=identity),
                        has_error=lambda: False,
                        content=SimpleNamespace(config_records={RECORD: answer}),
                    )
                )
        return found


class OneBase:
    """A base of 1,000 bytes."""

    def __init__(self, tmp_path):
        (tmp_path / "packed").write_bytes(b"x" * 1000)
        self.base = PackedBase(tmp_path / "packed", FINGERPRINT, "", 1000)

    def find(self, holder):
        return self.base


class Keys:
    """The ids of each key, which a test changes."""

    def __init__(self, **ids):
        self.ids = {key.removeprefix("_").encode(): value for key, value in ids.items()}

    def find_ids(self, key):
        return self.ids.get(key, ())

    def list_holders(self):
        return sorted(self.ids.values())


def honest(client, rows=6):
    """A client that has the base, and sends zeros."""

    def answer(kind, content):
        if kind != TRAIN:
            return {"clients": json.dumps({client: rows})}
        return {"update": make_update(ClientTask.from_bytes(content["task"]), ADAPTER)}

    return answer


def hostile(description=None, update=None):
    """A client that answers as given; it describes itself as `evil`, and sends zeros, where nothing is given."""

    def answer(kind, content):
        if kind != TRAIN:
            given = description(content) if callable(description) else description
            return {"clients": '{"evil": 6}'} if description is None else given
        task = ClientTask.from_bytes(content["task"])
        return update(task, ADAPTER) if update is not None else {"update": make_update(task, ADAPTER)}

    return answer


@pytest.fixture
def join(tmp_path, monkeypatch):
    """A function from a Grid to its clients. A node that was rejected may try again at once."""
    monkeypatch.setattr(guests, "_AGAIN_SECONDS", 0.0)

    def make(grid, keys=None, round_timeout=5.0, **network):
        options = {"join_timeout": 20.0, "lost_timeout": 1.0} | network
        limit = limit_update(ADAPTER)
        return FlowerClients(
            grid, NetworkConfig("x", **options), OneBase(tmp_path), limit, round_timeout=round_timeout, keys=keys
        )

    return make


def make_tasks(*clients, round=1):
    return [ClientTask("federation", round, 3, client, 0, FINGERPRINT, None) for client in clients]


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_node_that_describes_itself_wrongly_is_refused_and_the_others_start(name, join, caplog):
    grid = Crowd({1: hostile(DESCRIPTIONS[name]), 2: honest("a"), 3: honest("b")})
    clients = join(grid, Keys(_1=("evil",), _2=("a",), _3=("b",)))
    assert sorted(clients.gather(2)) == ["a", "b"]
    (record,) = (record for record in caplog.records if "is rejected" in record.message)
    assert "Node 1 is rejected" in record.getMessage() and record.getMessage().isprintable()
    assert len(record.getMessage()) < 600
    assert grid.asked.count((DESCRIBE, 1)) == 1  # it is not asked again until it reconnects
    grid.since[1] = "later"
    assert len(list(clients.train(make_tasks("a", "b")))) == 2
    assert grid.asked.count((DESCRIBE, 1)) == 2


@pytest.mark.parametrize(
    "claim", [lambda n: n, lambda n: 1, lambda n: 999, lambda n: 1000], ids=["by one", "always one", "less", "all"]
)
def test_node_that_does_not_keep_the_pieces_is_refused(claim, join):
    """One that claimed a byte more each time held the server for ever."""
    counts = iter(range(100_000))
    grid = Crowd({1: hostile(lambda content: {"received": claim(next(counts))}), 2: honest("a")})
    clients = join(grid)
    assert list(clients.gather(1)) == ["a"]
    for _ in range(5):
        clients._guests.attend()
    assert grid.asked.count((BASE, 1)) <= 1 and "does not keep the pieces" in clients._guests.rejected[1]


def test_nodes_that_are_silent_or_upload_for_ever_hold_nobody(join):
    """Flower waits for hours for an answer that was announced and is not uploaded, with all others behind it."""
    never = threading.Event()
    grid = Crowd({1: lambda kind, content: None, 2: lambda kind, content: never, 3: honest("a"), 4: honest("b")})
    try:
        clients = join(grid, round_timeout=2.0)
        began = time.monotonic()
        assert sorted(clients.gather(2)) == ["a", "b"]
        grid.nodes[3] = lambda kind, content: never  # now a client of the federation
        answers = list(clients.train(make_tasks("a", "b")))
        assert time.monotonic() - began < 15
    finally:
        never.set()
    assert answers[0].client_id == "b" and answers[1] == ClientFailure("a", "it did not answer within 2 s")


def test_node_that_reconnects_all_the_time_is_not_asked_all_the_time(join, monkeypatch):
    """Each answer that is announced and never uploaded keeps a thread for minutes."""
    grid = Crowd({1: hostile({}), 2: honest("a")})
    clients = join(grid)
    monkeypatch.setattr(guests, "_AGAIN_SECONDS", 3600.0)
    clients.gather(1)
    for number in range(20):
        grid.since[1] = str(number)
        clients._guests.attend()
    assert grid.asked.count((DESCRIBE, 1)) == 1
    grid.since[2] = "later"  # one that was not rejected is asked at once
    clients._guests.attend()
    assert grid.asked.count((DESCRIBE, 2)) == 2


@pytest.mark.parametrize("uploads", [False, True], ids=["silent", "announced and never uploaded"])
def test_node_that_reconnects_all_the_time_costs_a_bounded_amount(uploads, join, monkeypatch):
    """Without having been rejected: it does not answer at all, or keeps a thread waiting with each connection."""
    monkeypatch.setattr(grid_requests, "_PATIENCE_SECONDS", 0.0)
    never = threading.Event()
    grid = Crowd({1: lambda kind, content: never if uploads else None, 2: honest("a")})
    clients = join(grid)
    try:
        clients.gather(1)
        before, requests = threading.active_count(), clients._guests._requests
        for number in range(30):
            grid.since[1] = str(number)
            clients._guests.attend()
        assert len(requests._waiting) == 1  # an earlier connection's answer would be ignored
        assert len(requests._stuck) <= 8 and threading.active_count() <= before + 8
        grid.since[2] = "later"  # the others are heard
        clients._guests.attend()
        clients._guests.attend()
        assert len(list(clients.train(make_tasks("a")))) == 1
    finally:
        never.set()


def test_answer_that_flower_cannot_read_costs_its_client_alone(join):
    grid = Crowd({1: honest("a"), 2: honest("b")})
    clients = join(grid)
    clients.gather(2)
    grid.nodes[1] = lambda kind, content: KeyError("a class\nthat there is not")
    answers = {answer.client_id: answer for answer in clients.train(make_tasks("a", "b"))}
    assert answers["a"].reason.startswith("its answer can't be read (KeyError(") and answers["b"].num_examples == 1


@pytest.mark.parametrize("name", ["a metric with a name of 2 MB", "another client's", "nothing", "not an update"])
def test_update_that_breaks_a_rule_costs_its_client_alone(name, join):
    clients = join(Crowd({1: hostile(update=UPDATES[name]), 2: honest("a")}))
    clients.gather(2)
    answers = {answer.client_id: answer for answer in clients.train(make_tasks("a", "evil"))}
    assert isinstance(answers["evil"], ClientFailure) and answers["evil"].reason.isprintable()
    assert answers["a"].num_examples == 1


def test_clients_are_fixed_when_the_federation_begins(join):
    """A node that comes later with another id, or a client with other rows, is refused, as it is when it is resumed."""
    grid = Crowd({1: honest("a"), 2: honest("b", 7)})
    clients = join(grid)
    assert clients.gather(2) == {"a": 6, "b": 7}
    grid.nodes |= {3: honest("c"), 4: honest("a")}
    grid.since |= {2: "later", 3: "later", 4: "later"}
    grid.keys |= {3: b"3", 4: b"4"}
    grid.nodes[2] = honest("b", 8)
    answers = {answer.client_id: answer for answer in clients.train(make_tasks("a", "b"))}
    assert "it announces 8 rows of client 'b'; when this federation began, there were 7" in answers["b"].reason
    assert "'c', which is not one of the 2" in clients._guests.rejected[3]
    assert "'a', which is at node 1" in clients._guests.rejected[4]

    resumed = join(grid, join_timeout=1.0)
    with pytest.raises(RuntimeError, match=r"1 of 2 clients joined.*8 rows of client 'b'.*there were 7"):
        resumed.gather(2, known={"a": 6, "b": 7})
    grid.nodes[2] = honest("b", 7)
    grid.since[2] = "once more"
    assert join(grid).gather(2, known={"a": 6, "b": 7}) == {"a": 6, "b": 7}


def test_node_may_announce_no_more_clients_than_there_are_to_be(join):
    def many(kind, content):
        return {"clients": json.dumps({f"s{number}": 1 for number in range(4)})}

    with pytest.raises(RuntimeError, match="expected 1 to 3 ids"):
        join(Crowd({1: many}), join_timeout=0.5).gather(3)
    assert len(join(Crowd({1: many})).gather(4)) == 4


class TestKeys:
    """Ids belong to keys."""

    def test_key_may_announce_its_own_ids_alone(self, join):
        grid = Crowd({1: honest("a"), 2: honest("a"), 3: honest("b")})
        clients = join(grid, Keys(_1=("a", "c"), _2=("b",)), join_timeout=1.0)
        assert clients.gather(1) == {"a": 6}
        assert clients._guests.rejected == {
            2: "it announces client 'a'; its key is registered for b",
            3: "its key is not in the directory of --client_keys, or was withdrawn",
        }
        assert (DESCRIBE, 3) not in grid.asked  # a stranger is sent nothing

    def test_stranger_cannot_take_an_id_before_its_owner_comes(self, join):
        grid = Crowd({2: honest("a")})
        clients = join(grid, Keys(_1=("a",), _2=("b",)), join_timeout=0.5)
        with pytest.raises(RuntimeError, match="0 of 1 clients joined"):
            clients.gather(1)
        grid.nodes[1], grid.since[1], grid.keys[1] = honest("a"), "later", b"1"
        assert clients.gather(1) == {"a": 6}

    def test_withdrawn_key(self, join):
        """Between rounds its client is no longer asked; in a round its update is not taken."""
        keys = Keys(_1=("a",), _2=("b",))
        grid = Crowd({1: honest("a"), 2: honest("b")})
        clients = join(grid, keys)
        clients.gather(2)
        rounds = clients.train(make_tasks("a", "b"))
        assert next(rounds).client_id == "a"
        del keys.ids[b"2"]
        assert next(rounds).reason == "its key was withdrawn"
        answers = {answer.client_id: answer for answer in clients.train(make_tasks("a", "b", round=2))}
        assert "not in the directory of --client_keys, or was withdrawn" in answers["b"].reason
        assert answers["a"].round == 2 and grid.asked.count((TRAIN, 2)) == 1
