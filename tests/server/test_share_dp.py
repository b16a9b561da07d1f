# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Noise in shares in the round loop: sums of real clients, the budget, and an account that no crash makes smaller."""

import math

import numpy as np
import pytest
import torch

from fedlpp_hf.privacy import noise_shares
from fedlpp_hf.privacy.noise_shares import NoiseShares, compute_share_epsilon
from fedlpp_hf.privacy.secure_sums.server import SumServer
from fedlpp_hf.server.dropping import check_dropped
from fedlpp_hf.server.sampling import sample_clients
from fedlpp_hf.trainer.secure_rounds import sum_in_process
from fedlpp_hf.wire.messages import ClientFailure

from .small_server import KEY_B, PRIVATE, answer, make_server, read_ledger, read_record


pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")
pytest.importorskip("Crypto", reason="needs the extra [privacy]")
CLIENTS = {f"c{number}": 5 for number in range(6)}
SHARED = {**PRIVATE, "secure_aggregation": True, "secure_threshold": 0.5}


def make_private(output_dir, clients=CLIENTS, **options):
    return make_server(output_dir, clients, **{**SHARED, **options})


def train(tasks):
    return [answer(task, num_examples=5, delta={KEY_B: torch.full((4, 2), 0.1)}) for task in tasks]


def run(server, train=train, resume=False):
    return server.run(sum_in_process(server.args, server.adapter, train, server.count_opening), resume)


def spent(server, releases):
    return compute_share_epsilon({NoiseShares(server.dp.noise_multiplier, 1, 8): releases}, 1e-2)


def silence(monkeypatch):
    """No noise, so that what is under it can be compared."""
    monkeypatch.setattr(noise_shares, "draw_skellam", lambda variance, count, read: np.zeros(count, np.int64))


def stop(*values, **others):
    raise KeyboardInterrupt


def test_server_adds_nothing_and_divides_by_those_in_the_sum(tmp_path, monkeypatch):
    silence(monkeypatch)

    def train_some(tasks):
        for task in tasks:
            options = task.options
            # What a client adds, and what its policy may ask for.
            assert (options.share_noise, options.share_colluders, options.share_delta) == (4.0, 1, 1e-2)
            assert (options.clip_norm, task.noise_multiplier, task.num_clients) == (1.0, 4.0, 6)
            value = 100.0 if task.client_id == "c0" else 0.1  # c0's is far above the clip
            if task.client_id == "c5":
                yield ClientFailure("c5", "no rows today")
            else:
                yield answer(task, num_examples=5, delta={KEY_B: torch.full((4, 2), value)})

    server = make_private(tmp_path, num_rounds=1)
    run(server, train_some)
    record = read_record(server, 1)
    assert record["privacy"]["divisor"] == 5 and list(record["rejected"]) == ["c5"]
    expected = (1 / 8**0.5 + 4 * 0.1) / 5
    torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), expected), atol=5e-4, rtol=0)


def test_noise_is_on_the_servers_adapter(tmp_path):
    server = make_private(tmp_path, num_rounds=1)
    run(server)
    assert float((server.adapter[KEY_B] - 0.1).abs().min()) > 0


def test_records_say_what_is_spent(tmp_path):
    server = make_private(tmp_path, num_rounds=3)
    records = run(server)
    assert "privacy" not in records[0] and read_ledger(server)["releases"] == [1, 2, 3]
    for number, record in enumerate(records[1:], 1):
        privacy = record["privacy"]
        assert privacy["epsilon"] == spent(server, number)
        assert privacy["epsilon_of_another_round"] == spent(server, number + 1)
        assert (privacy["colluders"], privacy["noise_std"]) == (1, 4.0)
        assert "no gain by sampling; against replacing one client" in privacy["analysis"]
        assert math.isnan(record["sum"]["loss"]) and record["sum"]["steps"] == 0


def test_target_is_solved_for_before_anyone_is_asked(tmp_path):
    server = make_private(tmp_path, noise_multiplier=None, target_epsilon=3.0, num_rounds=4)
    assert server.dp.noise_multiplier > 1
    records = run(server)
    assert 2.98 < records[4]["privacy"]["epsilon"] <= 3.0 < records[4]["privacy"]["epsilon_of_another_round"]


def test_who_is_drawn_is_no_secret_but_a_client_spends_nothing_in_rounds_without_it(tmp_path):
    """Three of six clients are drawn in each round, and none of them in all: the one that is drawn most often counts."""
    options = {"noise_multiplier": None, "target_epsilon": 3.0, "num_rounds": 6}
    everyone = make_private(tmp_path / "everyone", **options)
    server = make_private(tmp_path / "drawn", clients_per_round=3, **options)
    drawn = [sample_clients(server.args, list(CLIENTS), number) for number in range(1, 7)]
    counts = [max(sum(client in draw for draw in drawn[:number]) for client in CLIENTS) for number in range(1, 7)]
    assert 3 <= counts[-1] < 6
    assert server.dp.noise_multiplier < everyone.dp.noise_multiplier
    records = run(server)
    for record, count in zip(records[1:], counts, strict=True):
        assert record["privacy"]["epsilon"] == spent(server, count)
    assert 2.98 < records[6]["privacy"]["epsilon"] <= 3.0
    assert f"each client was drawn for {counts[-1]} of them at most" in records[6]["privacy"]["analysis"]


def test_round_that_would_exceed_the_budget_does_not_start(tmp_path, caplog):
    asked = []

    def train_all(tasks):
        asked.append(tasks[0].round)
        return train(tasks)

    server = make_private(tmp_path, num_rounds=9, target_epsilon=3.0)
    assert len(run(server, train_all)) == len(asked) + 1 < 9
    assert spent(server, len(asked)) <= 3.0 < spent(server, len(asked) + 1)
    assert f"Round {len(asked) + 1} does not start: it would bring ε to" in caplog.text
    again = make_private(tmp_path, num_rounds=9, target_epsilon=3.0)
    run(again, lambda tasks: pytest.fail("asked"), resume=True)


def test_clients_follow_from_the_seed_as_without_noise(tmp_path):
    """A round that is redone must have the same clients: they open it for no others."""
    server = make_private(tmp_path, clients_per_round=4, num_rounds=3)
    records = run(server)
    expected = [sorted(sample_clients(server.args, list(CLIENTS), number)) for number in (1, 2, 3)]
    assert [record["asked"] for record in records[1:]] == expected


def test_sum_that_is_not_opened_stops_the_run_and_costs_nothing(tmp_path):
    server = make_private(tmp_path)
    with pytest.raises(RuntimeError, match="Round 1 has 0 acceptable updates.*a sum needs 3"):
        run(server, lambda tasks: train(tasks)[:2])
    assert read_ledger(server)["releases"] == []
    assert len(run(make_private(tmp_path), resume=True)) == 3


@pytest.mark.parametrize(
    ("point", "counted"),
    [("mask", [1, 2]), ("open", [1, 2, 2]), ("step", [1, 2]), ("commit", [1, 2])],
)
def test_crash_costs_what_may_have_been_seen(tmp_path, monkeypatch, point, counted):
    """Before the opening nothing was. After it, before the sum is on disk, a second sum has other noise, and their mean less."""
    server = make_private(tmp_path)
    trained = []

    def train_all(tasks):
        trained.append(tasks[0].round)
        return train(tasks)

    def break_second(record):
        if record["round"] == 1:
            target = {
                "mask": (SumServer, "make_survivors"),
                "open": (SumServer, "open"),
                "step": (server.optimizer.__class__, "step"),
                "commit": (server.store, "commit"),
            }[point]
            monkeypatch.setattr(*target, stop)

    server.on_round = break_second
    with pytest.raises(KeyboardInterrupt):
        run(server, train_all)
    monkeypatch.undo()
    assert read_ledger(server)["releases"] == ([1] if point == "mask" else [1, 2])
    resumed = make_private(tmp_path)
    records = run(resumed, train_all, resume=True)
    assert read_ledger(resumed)["releases"] == counted
    assert records[2]["privacy"]["epsilon"] == spent(resumed, len(counted))
    assert trained == ([1, 2] if point in ("step", "commit") else [1, 2, 2])  # else the sum is taken from the disk


@pytest.mark.parametrize(("point", "rounds"), [("step", 2), ("open", 1)])
def test_last_round_of_a_budget_is_taken_from_the_disk(tmp_path, monkeypatch, point, rounds):
    """It is paid for. If the sum itself is lost, a second one would exceed the budget."""
    options = {"noise_multiplier": None, "target_epsilon": 3.0}
    server = make_private(tmp_path, **options)

    def break_second(record):
        target = {"step": (server.optimizer.__class__, "step"), "open": (SumServer, "open")}[point]
        if record["round"] == 1:
            monkeypatch.setattr(*target, stop)

    server.on_round = break_second
    with pytest.raises(KeyboardInterrupt):
        run(server)
    monkeypatch.undo()
    records = run(make_private(tmp_path, **options), resume=True)
    assert len(records) == rounds + 1 and records[-1]["privacy"]["epsilon"] <= 3.0
    assert read_ledger(server)["releases"] == [1, 2]


def test_sums_that_came_without_a_word_are_counted_too(tmp_path):
    """A transport of one's own may not say that it is about to open a sum."""
    server = make_private(tmp_path)
    server.run(sum_in_process(server.args, server.adapter, train, lambda number: None))
    assert read_ledger(server)["releases"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_epsilon": 0.1}, "the first round alone spends ε = .*, and target_epsilon=0.1. Leave"),
        ({"target_delta": 1 / 6}, "with 6 clients: with 1/6 or more"),
        ({"colluding_clients": 4}, "with 4 clients, and 4 may collude: nobody's noise would count. Lower coll"),
        (
            {"target_epsilon": 1e-4, "noise_multiplier": None, "target_delta": 1e-9},
            "No noise makes 2 rounds spend less",
        ),
    ],
    ids=str,
)
def test_what_this_federation_does_not_allow_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_private(tmp_path, **options)


def test_what_was_accounted_with_may_not_change_on_resume(tmp_path):
    run(make_private(tmp_path))
    with pytest.raises(ValueError, match="begun with colluding_clients=1"):
        run(make_private(tmp_path, num_rounds=3, colluding_clients=0), resume=True)


def test_hopeless_noise_is_warned_of_with_the_noise_that_does_not_count(tmp_path, caplog):
    make_private(tmp_path)
    # √(6/3) · 4 · √8 of six clients, of whose noise that of four less one counts.
    assert (
        "is 2.7 times as long as the clip: 8 values, noise multiplier 4, 6 clients in a round, of which the noise"
        in (caplog.text)
    )
    assert "of 3 counts" in caplog.text


def test_clients_are_not_dropped_below_min_clients(tmp_path):
    """The draws are known, and a round that is too small would fail."""
    server = make_private(tmp_path, min_clients=6)
    with pytest.raises(ValueError, match="Without the dropped clients .c1., round 1 would ask 5; min_clients=6"):
        check_dropped(server.args, list(CLIENTS), ["c1"], 1)
