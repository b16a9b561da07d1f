# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients that the owner drops: not asked, written down, known to whoever resumes; the others' draws stay."""

import pytest

from fedlpp_hf.server.dropping import check_dropped
from fedlpp_hf.server.store import DROPPED_FILE, RoundStore
from tests.server.small_server import answer_all, make_server, read_record


MANY = {f"c{number}": 1 for number in range(8)}


def run_dropping(output_dir, after, **options):
    """The clients that are asked in each round, where `c1` is dropped after the round `after`."""
    server = make_server(output_dir, MANY, num_rounds=6, clients_per_round=3, min_clients=1, **options)
    asked = []

    def on_round(record):
        if record["round"] == after:
            server.dropped = frozenset({"c1"})

    server.on_round = on_round
    server.run(lambda tasks: asked.append([task.client_id for task in tasks]) or answer_all(tasks))
    return server, asked


def test_others_are_drawn_as_before(tmp_path):
    _, whole = run_dropping(tmp_path / "whole", None)
    server, asked = run_dropping(tmp_path / "dropped", 2)
    assert any("c1" in clients for clients in whole[2:])
    assert asked == whole[:2] + [[client for client in clients if client != "c1"] for clients in whole[2:]]
    assert [read_record(server, number).get("dropped") for number in range(7)] == [None] * 3 + [["c1"]] * 4


def test_resumed_federation_knows_them(tmp_path):
    server = make_server(tmp_path, num_rounds=4, min_clients=1)
    server.is_over = lambda number: number == 3
    server.run(answer_all)
    server.store.write_dropped(["b", "a"])
    resumed = make_server(tmp_path, num_rounds=4, min_clients=1)
    resumed.run(answer_all, resume=True)
    assert [read_record(resumed, number)["asked"] for number in (2, 3, 4)] == [["a", "b", "c"], ["c"], ["c"]]
    again = make_server(tmp_path, num_rounds=2, overwrite=True)
    again.run(answer_all)
    assert again.store.read_dropped() == [] and read_record(again, 2)["asked"] == ["a", "b", "c"]


def test_what_would_leave_too_few_is_refused(tmp_path):
    args = make_server(tmp_path, MANY, num_rounds=30, clients_per_round=3, min_clients=2).args
    clients = list(MANY)
    check_dropped(args, clients, {"c1"}, 1)
    with pytest.raises(ValueError, match=r"\(c1, c2, c3\), round \d+ would ask [01]; min_clients=2"):
        check_dropped(args, clients, {"c1", "c2", "c3"}, 1)
    check_dropped(args, clients, set(clients), 31)  # no round is left
    with pytest.raises(ValueError, match="'c11' is no client of this federation; did you mean `c1`?"):
        check_dropped(args, clients, {"c11"}, 1)


def test_rounds_whose_draw_is_secret_are_not_looked_at(tmp_path):
    private = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "clip_update_norm": 1.0,
        "weighting": "uniform",
        "min_clients": 1,
    }
    args = make_server(tmp_path, MANY, **private).args
    check_dropped(args, list(MANY), set(MANY), 1)  # such a round is noise, and is committed
    with pytest.raises(ValueError, match="'c11' is no client"):
        check_dropped(args, list(MANY), {"c11"}, 1)


def test_damaged_file_is_a_clear_error(tmp_path):
    store = RoundStore(tmp_path)
    store.create({"federation_id": "f"})
    assert store.read_dropped() == []
    store.write_dropped({"b", "a"})
    assert store.read_dropped() == ["a", "b"]
    path = store.root / DROPPED_FILE
    path.write_text(path.read_text().replace('"a"', '"c"'))
    with pytest.raises(ValueError, match="dropped.json` is damaged or was changed by hand"):
        store.read_dropped()
    path.write_text("[")
    with pytest.raises(ValueError, match="can't be read"):
        store.read_dropped()


def test_rounds_end_where_the_owner_says(tmp_path):
    """Asked before each round; stopped and resumed is bit-identical to uninterrupted."""
    server, asked = make_server(tmp_path / "cut", num_rounds=4), []
    server.is_over = lambda number: asked.append(number) or number == 3
    records = server.run(answer_all)
    assert asked == [1, 2, 3] and len(records) == 3
    resumed, whole = make_server(tmp_path / "cut", num_rounds=4), make_server(tmp_path / "whole", num_rounds=4)
    assert len(resumed.run(answer_all, resume=True)) == len(whole.run(answer_all)) == 5
    assert all(resumed.adapter[key].equal(whole.adapter[key]) for key in whole.adapter)
