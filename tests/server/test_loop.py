# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The round loop on adapters alone: sampling, what is broadcast, what is counted, and what a round leaves behind."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from fedlpp_hf.server.store import FEDERATION_FILE, LOCK_FILE
from fedlpp_hf.wire.encoding import restore_tensors

from .small_server import CLIENTS, KEY_B, answer, answer_all, make_server


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


def test_rounds_add_up(tmp_path):
    sent = []

    def run(tasks):
        sent.append(restore_tensors(tasks[0].proxy)[KEY_B][0, 0].item())
        return answer_all(tasks)

    server = make_server(tmp_path, num_rounds=6)
    server.run(run)
    torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), 6.0))
    assert sent == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_what_is_never_broadcast_is_averaged_in_one_round(tmp_path):
    def run(tasks):
        assert [task.proxy for task in tasks] == [None] * 3
        return [answer(task, float(value)) for value, task in enumerate(tasks, 1)]

    server = make_server(tmp_path, broadcast="never", num_rounds=1, weighting="uniform")
    server.run(run)
    torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), 2.0))


def test_ways_without_a_broadcast_are_averaged_anew_by_the_rounds_in_them(tmp_path):
    """Client c misses the second round, so its way is a round shorter than the others' in the third."""

    def run(tasks):
        number = tasks[0].round
        assert all(task.proxy is None and task.goes_on for task in tasks)
        ways = {"a": 1.0, "b": 2.0, "c": 3.0 if number == 1 else 2.0}
        answers = [answer(task, number * ways[task.client_id]) for task in tasks]
        return [update for update in answers if (number, update.client_id) != (2, "c")]

    server = make_server(tmp_path, broadcast="never", num_rounds=3, weighting="uniform", clients_per_round=3)
    server.run(run)
    ends = [float(server.store.load(number)[0][KEY_B][0, 0]) for number in (1, 2, 3)]
    assert ends == pytest.approx([2.0, (2 + 4) / 2, (3 * 3 + 3 * 6 + 2 * 6) / 8])


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
        held = {os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()} - {
            str(server.store.root / LOCK_FILE)
        }
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


@pytest.mark.parametrize("aggregation", ["fedavg", "exact"])
def test_all_tasks_of_a_round_share_one_proxy(tmp_path, aggregation):
    """Ten thousand clients take the memory of one proxy."""
    seen = []

    def run(tasks):
        seen.extend(task.proxy for task in tasks)
        return answer_all(tasks)

    make_server(tmp_path, num_rounds=1, aggregation=aggregation).run(run)
    assert len(seen) == 3 and all(proxy is seen[0] for proxy in seen)


@pytest.mark.parametrize("options", [{}, {"adapter_bits": 3}, {"broadcast": "never", "num_rounds": 1}], ids=str)
def test_counted_bytes_are_those_of_the_messages(tmp_path, options):
    down, up = [], []

    def run(tasks):
        down.append(sum(len(task.to_bytes()) for task in tasks))
        answers = answer_all(tasks)
        up.append(sum(len(update.to_bytes()) for update in answers))
        return answers

    records = make_server(tmp_path, **options).run(run)
    assert [record["bytes_down"] for record in records] == [0, *down]
    assert [record["bytes_up"] for record in records] == [0, *up]
    for record in records[1:]:
        assert list(record["traffic"]) == record["asked"]
        for way in ("bytes_down", "bytes_up"):
            assert sum(cost[way] for cost in record["traffic"].values()) == record[way]


def test_yogi_steps_by_its_learning_rate(tmp_path, monkeypatch):
    """In the first round it moves by lr·m/(√v + τ) ≈ lr·(1 − β₁)/√(1 − β₂), whatever Δ."""
    monkeypatch.setattr("fedlpp_hf.aggregation.optimizers.TAU", 1e-6)
    moved = []
    for value in (1.0, 100.0):
        server = make_server(tmp_path / f"{value}", num_rounds=1, server_optimizer="yogi", server_learning_rate=0.1)
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


def test_federation_of_an_older_version_is_refused_in_one_line(tmp_path):
    make_server(tmp_path, num_rounds=1).run(answer_all)
    path = tmp_path / "_federation" / FEDERATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    with pytest.raises(ValueError, match="has schema 1; this version of fedlpp_hf reads 2. Resume it with") as error:
        make_server(tmp_path).run(answer_all, resume=True)
    assert "\n" not in str(error.value)
