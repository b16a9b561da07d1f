# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Client-level differential privacy in the round loop: noise, budget, draws, and an account that no crash makes smaller."""

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
import stat

import numpy as np
import pytest
import torch
from peft import LoraConfig

from fedlpp_hf import FederatedServer
from fedlpp_hf.privacy import client_level
from fedlpp_hf.privacy.accounting import compute_epsilon
from fedlpp_hf.privacy.draws import draw_clients
from fedlpp_hf.server import ledger
from fedlpp_hf.server.ledger import LEDGER_FILE

from .small_server import KEY_A, KEY_B, PRIVATE, answer, make_server, read_ledger, read_record


pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")
CLIENTS = {f"c{number}": 5 for number in range(8)}
POISSON = {"client_sampling": "poisson", "clients_per_round": 4, "noise_multiplier": 1.0}


@pytest.fixture(autouse=True)
def known_secrets(monkeypatch):
    """Each federation's secret is another one, and the same in each run of a test: a draw of nobody, 1 in 256, would ask nobody."""
    count = itertools.count()
    monkeypatch.setattr(
        ledger.secrets, "token_hex", lambda size: hashlib.sha256(bytes([next(count)])).hexdigest()[: 2 * size]
    )


def make_private(output_dir, clients=CLIENTS, **options):
    return make_server(output_dir, clients, **{**PRIVATE, **options})


def answer_small(task, value=0.1, **changes):
    delta = {KEY_B: torch.full((4, 2), value)}
    return answer(task, num_examples=5, delta=delta, **changes)


def answer_all(tasks):
    return [answer_small(task) for task in tasks]


def spent(server, releases):
    return compute_epsilon(server.dp.noise_multiplier, server.dp.sampling, releases, 1e-2)


def draw_again(server, number):
    return draw_clients(bytes.fromhex(read_ledger(server)["secret"]), number, list(CLIENTS), server.dp.sampling)


def silence(monkeypatch):
    """No noise, so that what is under it can be compared."""
    monkeypatch.setattr(client_level, "draw_gaussian", lambda count, read_bytes: np.zeros(count))


# --- The mean and its noise.
def test_mean_is_the_clipped_sum_by_the_expected_number_whoever_drops_out(tmp_path, monkeypatch):
    silence(monkeypatch)

    def run(tasks):
        # What a client's policy may ask for.
        assert {(task.options.clip_norm, task.noise_multiplier, task.num_clients) for task in tasks} == {(1.0, 4.0, 8)}
        answers = [answer_small(task, 100.0 if task.client_id == "c0" else 0.1) for task in tasks]  # c0 does not clip
        return [update for update in answers if update.client_id not in ("c6", "c7")]

    server = make_private(tmp_path, num_rounds=1)
    server.run(run)
    expected = (1 / 8**0.5 + 5 * 0.1) / 8  # of a norm of 1; divided by all eight
    torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), expected))


def test_noise_of_a_real_round_has_the_variance_that_is_accounted(tmp_path):
    values, clip, noise = (400, 50), 0.7, 1.3
    key = "base_model.model.q.lora_B.weight"
    adapter = {KEY_A: torch.ones(50, 4), key: torch.zeros(values)}
    args = make_private(tmp_path, num_rounds=1, noise_multiplier=noise, clip_update_norm=clip).args
    server = FederatedServer(args, adapter, LoraConfig(r=50, target_modules=["q"]), CLIENTS, "fingerprint")
    one = torch.full(values, 1e-4)
    server.run(lambda tasks: [answer(task, num_examples=5, delta={key: one}) for task in tasks])
    left = server.adapter[key].double() - one  # eight equal updates by eight
    std, count = noise * clip / 8, left.numel()
    assert read_record(server, 1)["privacy"]["noise_std"] == pytest.approx(noise * clip)
    assert float(left.var()) / std**2 == pytest.approx(1, abs=5 * (2 / count) ** 0.5)
    assert abs(float(left.mean())) < 5 * std / count**0.5


def test_rounds_without_anyone_are_noise_and_are_paid_for(tmp_path, caplog):
    server = make_private(tmp_path, **POISSON, num_rounds=2)
    server.dp.draw_clients = list
    records = server.run(lambda tasks: pytest.fail("nobody was drawn"))
    assert [record["clients"] for record in records] == [{}] * 3
    assert records[2]["privacy"]["releases"] == 2 and float(server.adapter[KEY_B].abs().min()) > 0
    assert "Round 1 has no update; its noise is drawn" in caplog.text


def test_everyone_failing_tells_nobody_so(tmp_path):
    """A round that stopped would tell that nobody, or not that client, took part."""
    assert len(make_private(tmp_path).run(lambda tasks: [])) == 3


def test_all_that_poisson_draws_are_in_the_sum(tmp_path, monkeypatch):
    """More than `clients_per_round`, too, whose mean number it is."""
    silence(monkeypatch)
    server = make_private(tmp_path, **POISSON, num_rounds=1)
    server.dp.draw_clients = lambda: list(CLIENTS)
    (record,) = server.run(answer_all)[1:]
    assert len(record["clients"]) == 8 and record["privacy"]["divisor"] == 4
    torch.testing.assert_close(server.adapter[KEY_B], torch.full((4, 2), 8 * 0.1 / 4))


def test_draws_do_not_follow_from_the_seed(tmp_path):
    """Clients know the seed, and sampling helps only against who does not know the draw."""
    servers = [make_private(tmp_path / name, **POISSON, seed=1, num_rounds=6) for name in "ab"]
    drawn = [[record["asked"] for record in server.run(answer_all)] for server in servers]
    assert drawn[0] != drawn[1]
    assert read_ledger(servers[0])["secret"] != read_ledger(servers[1])["secret"]


def test_adaptive_clip_reaches_clients_and_the_noise_follows_it(tmp_path, monkeypatch):
    silence(monkeypatch)
    clips = []

    def run(tasks):
        clips.append(tasks[0].options.clip_norm)
        return [answer_small(task, metrics={"loss": 1.0, "steps": 1, "clipped": 1.0}) for task in tasks]

    options = {"clip_quantile": 0.5, "num_rounds": 2}
    make_private(tmp_path, **options).run(run)
    server = make_private(tmp_path, **options | {"num_rounds": 3})
    records = server.run(run, resume=True)
    assert clips == pytest.approx([1.0, np.exp(0.1), np.exp(0.2)])  # all of them longer: up by 0.2·(0.5 − 0)
    for record, clip in zip(records[1:], clips, strict=True):
        privacy = record["privacy"]
        assert privacy["clip_norm"] == clip and privacy["below_clip"] == pytest.approx(0.0)
        assert privacy["noise_std"] == pytest.approx(4.0 * clip / 0.95**0.5)


# --- The budget.
def test_every_record_has_what_is_spent(tmp_path):
    server = make_private(tmp_path, num_rounds=3)
    records = server.run(answer_all)
    assert "privacy" not in records[0]
    for number, record in enumerate(records[1:], 1):
        assert record["privacy"]["epsilon"] == spent(server, number)
        assert record["privacy"]["epsilon_of_another_round"] == spent(server, number + 1)
        assert "replacing one client" in record["privacy"]["analysis"]


def test_target_is_solved_for_before_anyone_is_asked_and_met_by_the_last_round(tmp_path):
    server = make_private(tmp_path, noise_multiplier=None, target_epsilon=3.0, num_rounds=4)
    assert server.dp.noise_multiplier > 1
    records = server.run(answer_all)
    assert 2.9 < records[4]["privacy"]["epsilon"] <= 3.0 < records[4]["privacy"]["epsilon_of_another_round"]


def test_round_that_would_exceed_the_budget_does_not_start(tmp_path, caplog):
    asked = []

    def run(tasks):
        asked.append(tasks[0].round)
        return answer_all(tasks)

    server = make_private(tmp_path, num_rounds=9, target_epsilon=4.0)
    records = server.run(run)
    assert asked == [1, 2, 3, 4, 5, 6, 7] and len(records) == 8
    assert spent(server, 7) <= 4.0 < spent(server, 8)
    assert "Round 8 does not start: it would bring ε to" in caplog.text
    assert (tmp_path / "adapter_model.safetensors").is_file()  # what is committed is published
    again = make_private(tmp_path, num_rounds=9, target_epsilon=4.0)
    assert len(again.run(lambda tasks: pytest.fail("asked"), resume=True)) == 8


def test_a_longer_federation_keeps_its_noise_and_its_budget(tmp_path):
    """Solved for anew, ten rounds would get more noise than two, and those that are done had less."""
    options = {"noise_multiplier": None, "target_epsilon": 3.0}
    first = make_private(tmp_path, num_rounds=2, **options)
    first.run(answer_all)
    longer = make_private(tmp_path, num_rounds=10, **options)
    assert len(longer.run(answer_all, resume=True)) == 3
    assert longer.dp.noise_multiplier == first.dp.noise_multiplier


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_epsilon": 0.1}, "the first round alone spends ε = .*, and target_epsilon=0.1. Leave"),
        ({"target_delta": 0.125}, "target_delta=0.125 with 8 clients: with 1/8 or more"),
        ({"clients_per_round": 4, "update_bits": 4}, "update_bits=4, .* and 4 of 8 clients in a round: .*'poisson'"),
        ({"clients_per_round": 4, "update_density": 0.5}, "update_density=0.5 and 4 of 8"),
    ],
    ids=str,
)
def test_what_this_federation_does_not_allow_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_private(tmp_path, **options)


@pytest.mark.parametrize("options", [{"update_bits": 4}, {"update_bits": 4, **POISSON}], ids=["everyone", "poisson"])
def test_compressed_updates_are_clipped_after_decompression(tmp_path, options):
    make_private(tmp_path, **options)


def test_hopeless_noise_is_warned_of_with_the_arithmetic(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_private(tmp_path, aggregation="fedavg")
    assert "16 values, noise multiplier 4, 8 clients in a round. It takes 16 clients" in caplog.text
    assert "aggregation='freeze_a' is the better choice" in caplog.text
    caplog.clear()
    make_private(tmp_path, noise_multiplier=1.0)  # √8 < 8
    assert not caplog.text


# --- The account.
def test_crash_before_the_noise_costs_nothing_and_draws_the_same_clients(tmp_path):
    asked = []

    def fail(tasks):
        asked.append([task.client_id for task in tasks])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer_all(tasks)

    with pytest.raises(KeyboardInterrupt):
        make_private(tmp_path, **POISSON).run(fail)
    resumed = make_private(tmp_path, **POISSON)
    resumed.run(fail, resume=True)
    assert read_ledger(resumed)["releases"] == [1, 2] and asked[1] == asked[2]


@pytest.mark.parametrize("point", ["noise", "step", "commit"])
def test_crash_after_the_intent_counts_and_draws_others(tmp_path, monkeypatch, point):
    """Between the intent and the commit the noisy sum may have been seen: another one of the same clients would average it."""
    server = make_private(tmp_path, **POISSON, num_rounds=3, target_epsilon=None)
    asked = []

    def run(tasks):
        asked.append([task.client_id for task in tasks])
        return answer_all(tasks)

    def stop(*values, **others):
        raise KeyboardInterrupt

    def break_second(record):
        if record["round"] != 1:
            return
        target = {
            "noise": (client_level, "draw_gaussian"),
            "step": (server.optimizer.__class__, "step"),
            "commit": (server.store, "commit"),
        }[point]
        monkeypatch.setattr(*target, stop)

    server.on_round = break_second
    with pytest.raises(KeyboardInterrupt):
        server.run(run)
    monkeypatch.undo()
    assert read_ledger(server)["releases"] == [1, 2] and server.store.latest() == 1
    resumed = make_private(tmp_path, **POISSON, num_rounds=3)
    records = resumed.run(run, resume=True)
    assert read_ledger(resumed)["releases"] == [1, 2, 2, 3]
    assert records[2]["privacy"]["releases"] == 3 and records[3]["privacy"]["epsilon"] == spent(resumed, 4)
    draws = [draw_again(resumed, number) for number in range(4)]
    assert asked == [draw for draw in draws if draw]  # a draw of its own for each release


def test_a_lost_round_is_taken_from_the_end_of_the_budget(tmp_path, monkeypatch):
    options = {"noise_multiplier": None, "target_epsilon": 3.0, "num_rounds": 3}
    server = make_private(tmp_path, **options)
    monkeypatch.setattr(server.optimizer.__class__, "step", lambda *values: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        server.run(answer_all)
    monkeypatch.undo()
    records = make_private(tmp_path, **options).run(answer_all, resume=True)
    assert [record["round"] for record in records] == [0, 1, 2]  # two of three, and ε is kept
    assert records[2]["privacy"]["epsilon"] <= 3.0


def test_a_round_that_is_deleted_and_run_again_counts_twice(tmp_path):
    """As the message about a damaged round advises; with noise drawn anew it would be averaged away, unaccounted."""
    server = make_private(tmp_path)
    server.run(answer_all)
    shutil.rmtree(server.store.round_dir(2))
    records = make_private(tmp_path).run(answer_all, resume=True)
    assert read_ledger(server)["releases"] == [1, 2, 2]
    assert records[2]["privacy"]["epsilon"] == spent(server, 3)


def test_rounds_that_are_all_deleted_are_no_fresh_budget(tmp_path):
    server = make_private(tmp_path)
    server.run(answer_all)
    shutil.rmtree(server.store.root / "rounds")
    for again in (True, False):
        with pytest.raises(ValueError, match="noise was drawn 2 times, but no round is there"):
            make_private(tmp_path).run(answer_all, resume=again)
    make_private(tmp_path, overwrite=True).run(answer_all)
    assert read_ledger(server)["releases"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "can't be read .*so it is unknown what was spent"),
        ({"releases": [1]}, "has 1 releases of federation .*; the rounds are of .* and have 2"),
        ({"federation_id": "other"}, "2 releases of federation other"),
        ({"schema": 9}, "can't be read .expected schema 1"),
        ({"more": 1}, "can't be read"),
    ],
    ids=str,
)
def test_a_ledger_that_is_not_the_one_is_refused(tmp_path, change, message):
    server = make_private(tmp_path)
    server.run(answer_all)
    path = server.store.root / LEDGER_FILE
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(read_ledger(server) | change))
    with pytest.raises(ValueError, match=message):
        make_private(tmp_path, num_rounds=3).run(lambda tasks: pytest.fail("asked"), resume=True)


def test_the_ledger_is_its_owners(tmp_path):
    server = make_private(tmp_path)
    server.run(answer_all)
    assert stat.S_IMODE((server.store.root / LEDGER_FILE).stat().st_mode) == 0o600
    for number in (0, 1, 2):  # rounds are looked at, and sent around
        assert read_ledger(server)["secret"] not in (server.store.round_dir(number) / "round.json").read_text()


def test_without_noise_there_is_no_ledger(tmp_path):
    server = make_server(tmp_path)
    server.run(lambda tasks: [answer(task) for task in tasks])
    assert server.dp is None and not (server.store.root / LEDGER_FILE).exists()


@pytest.mark.parametrize("option", ["noise_multiplier", "target_delta", "clip_update_norm", "clip_quantile"])
def test_what_was_accounted_with_may_not_change_on_resume(tmp_path, option):
    make_private(tmp_path, clip_quantile=0.5).run(answer_all)
    changed = {option: 0.005 if option == "target_delta" else 0.9}
    with pytest.raises(ValueError, match=f"begun with {option}="):
        make_private(tmp_path, **{"clip_quantile": 0.5, "num_rounds": 3} | changed).run(answer_all, resume=True)


def test_metrics_of_clients_change_nothing_but_the_clip(tmp_path, monkeypatch):
    """Losses and numbers of rows are claims; with equal weights the mean does not depend on them."""
    silence(monkeypatch)
    ends = []
    for rows, loss in ((1, 0.1), (5, 9.0)):
        server = make_private(tmp_path / str(rows), num_rounds=1)
        server.run(
            lambda tasks, rows=rows, loss=loss: [
                dataclasses.replace(answer_small(task), num_examples=rows, metrics={"loss": loss, "steps": 1})
                for task in tasks
            ]
        )
        ends.append(server.adapter[KEY_B])
    assert torch.equal(*ends)
