# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ledger of a client's sums: a round is opened for one set of survivors, and no round before the last."""

import json
import logging
import re
import stat
import sys

import numpy as np
import pytest
import torch

from fedlpp_hf import FederatedConfig
from fedlpp_hf.client.sums import LEDGER_FILE, ClientSums, OpenedRounds, SumLedger
from fedlpp_hf.privacy.noise_shares import NoiseShares, compute_share_epsilon
from fedlpp_hf.privacy.secure_sums.client import RefusedError, SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.rounds import run_sum
from fedlpp_hf.privacy.secure_sums.terms import make_terms as make_own_terms
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions
from tests.privacy.secure_sums.parties import make_terms, name_clients, run


@pytest.fixture
def ledger(tmp_path):
    return SumLedger(tmp_path / LEDGER_FILE)


def test_round_is_opened_for_one_set_of_survivors(ledger):
    ledger.enter("f", 3, "these")
    ledger.enter("f", 3, "these")  # the same sum says nothing new
    again = SumLedger(ledger.file)  # after a restart
    with pytest.raises(RefusedError, match="helped to open round 3 for other survivors"):
        again.enter("f", 3, "those")
    again.enter("f", 4, "those")


def test_no_round_comes_after_a_later_one(ledger):
    ledger.enter("f", 3, "these")
    for call in (lambda: ledger.check("f", 2), lambda: ledger.enter("f", 2, "these")):
        with pytest.raises(RefusedError, match="open the sum of round 3 .*takes no part in round 2 again"):
            call()
    ledger.check("f", 3)
    ledger.enter("g", 1, "these")  # another federation
    ledger.check("f", 4, "those")


def test_damaged_ledger_opens_nothing(ledger):
    for text in ("{", "[]", '{"f": 3}', '{"f": [null, null]}'):
        ledger.file.write_text(text)
        with pytest.raises(RefusedError, match="ledger of sums is damaged"):
            ledger.enter("f", 9, "these")


def test_noise_is_counted_and_a_round_is_masked_three_times_at_most(ledger):
    """Each time with other noise: a server that says it has crashed, again and again, would average it away."""
    noise, other = NoiseShares(1.5, 1, 8), NoiseShares(2.0, 3, 8)
    for _ in range(3):
        ledger.note_noise("f", 3, noise)
    again = SumLedger(ledger.file)
    for call in (lambda: again.check_noise("f", 3), lambda: again.note_noise("f", 3, noise)):
        with pytest.raises(
            RefusedError, match="masked its update of round 3 as often as it does, 3 times: each has other noise"
        ):
            call()
    again.enter("f", 3, "these")  # the third may still be opened
    again.note_noise("f", 4, other)
    assert again.find("f") == OpenedRounds(3, "these", [(3, 1.5, 1)] * 3 + [(4, 2.0, 3)])
    assert again.find("g") == OpenedRounds()


def test_ledger_of_an_older_version_has_no_noise(ledger):
    ledger.file.write_text(json.dumps({"f": [3, "these"]}))
    assert ledger.find("f") == OpenedRounds(3, "these", [])
    ledger.note_noise("f", 4, NoiseShares(1.0, 1, 8))
    assert ledger.find("f") == OpenedRounds(3, "these", [(4, 1.0, 1)])


def test_ledger_is_for_its_user_alone(ledger):
    ledger.enter("f", 1, "these")
    assert stat.S_IMODE(ledger.file.stat().st_mode) == 0o600


class TestRedoneRound:
    """The server opens a round, and says that it has lost the sum."""

    @pytest.fixture
    def redo(self, tmp_path):
        """A function that runs round 3 with some clients, who have opened it for the first four; and the steps they took."""
        pytest.importorskip("Crypto", reason="needs the extra [privacy]")
        ledgers = {name: SumLedger(tmp_path / name) for name in name_clients(6)}

        def run_round(names, lost=()):
            clients, heard = {}, []
            for name in names:
                ledger = ledgers[name]
                clients[name] = SumClient(
                    make_terms(5),
                    name,
                    Contribution(np.zeros(5, np.float32), 1.0, 1),
                    admit=lambda members, ledger=ledger: ledger.check("federation", 3, members),
                    approve=lambda survivors, ledger=ledger: ledger.enter("federation", 3, survivors),
                )
            found, failures = run(make_terms(5), clients, lost=lost, heard=heard)
            return found, failures, {(step, client) for step, client, _ in heard}

        assert run_round(name_clients(4))[0].clients == tuple(name_clients(4))
        return run_round

    def test_the_same_sum_is_opened_again(self, redo):
        assert redo(name_clients(4))[0].clients == tuple(name_clients(4))

    @pytest.mark.parametrize("number", [3, 5])
    def test_nobody_masks_an_update_for_others(self, redo, number):
        """One client less, or more: the difference to the first sum would be that client's update."""
        found, failures, heard = redo(name_clients(number))
        assert found is None and "for other survivors" in failures["site-00"]
        assert not {client for step, client in heard if step == "shares"} & set(name_clients(4))

    def test_nobody_opens_the_sum_of_fewer(self, redo):
        found, failures, heard = redo(name_clients(4), lost=[("shares", "site-03")])
        assert found is None and "for other survivors" in failures["site-00"]
        assert not [step for step, _ in heard if step == "opening"]

    def test_those_who_did_not_open_it_can_not_open_it_with_them(self, redo):
        """Two new clients and one of the first: two are not enough for a threshold above one half."""
        found, failures, _ = redo(["site-00", "site-04", "site-05"], lost=[("shares", "site-05")])
        assert found is None and "for other survivors" in failures["site-00"]


class TestNoiseInShares:
    """Clients with ledgers, in rounds to which they add noise."""

    @pytest.fixture
    def open_round(self, tmp_path):
        """A function that opens the sum of a round, and returns what its clients answered, or why they did not."""
        pytest.importorskip("Crypto", reason="needs the extra [privacy]")
        pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")
        args = FederatedConfig(
            "out", report_to=[], use_cpu=True, weighting="uniform", secure_aggregation=True, secure_threshold=0.5,
            clip_update_norm=1.0,
        )  # fmt: skip
        adapter, everyone = {"q.lora_A.weight": torch.zeros(2, 4)}, name_clients(9)
        sums = {name: ClientSums(args, adapter, tmp_path / name) for name in everyone}
        for name in everyone:
            (tmp_path / name).mkdir()

        def run_round(number, noise=4.0, colluders=1, names=everyone[:3], unasked=""):
            options = LocalOptions(share_noise=noise, share_colluders=colluders, share_delta=1e-2)
            tasks = {name: ClientTask("f", number, 9, name, 0, "ab" * 32, None, options) for name in names}

            def train(asked):
                for name, task in asked.items():
                    update = ClientUpdate("f", number, name, "ab" * 32, 5, dict(adapter), {"loss": 1.0, "steps": 1})
                    try:
                        yield name, sums[name].begin(task, update)
                    except ValueError as error:
                        yield name, str(error)

            def ask(step, requests):
                for name, request in requests.items():
                    if step == "opening" and name == unasked:
                        continue
                    try:
                        yield name, sums[name].answer(name, step, request)
                    except ValueError as error:
                        yield name, str(error)

            terms = make_own_terms(args, tasks["site-00"], 8)
            return list(run_sum(terms, tasks, 3, train, ask))

        return run_round

    def test_log_says_what_all_sums_spend(self, open_round, caplog):
        with caplog.at_level(logging.INFO):
            open_round(1)
            open_round(1)  # the server has crashed
            open_round(2, noise=3.0)
        lines = [record.message for record in caplog.records if "share of the noise" in record.message]
        assert len(lines) == 9
        sums = {NoiseShares(4.0, 1, 8): 2, NoiseShares(3.0, 1, 8): 1}
        assert lines[-1].startswith(
            "Round 2: this client's update leaves masked, with its share of the noise, noise multiplier 3."
        )
        assert lines[-1].endswith(
            f"the 3 sums of this federation that may have it spend ε = {compute_share_epsilon(sums, 1e-2):.3f} at δ = 0.01."
        )
        assert "If no more than 1 of the others help the server" in lines[0] and "the 1 sums of" in lines[0]

    def test_server_that_goes_on_asking_gets_three_sums(self, open_round):
        assert [len(open_round(1)) for _ in range(3)] == [1, 1, 1]
        reasons = {answer.reason for answer in open_round(1)}
        assert reasons == {
            "this client has masked its update of round 1 as often as it does, 3 times: each has other noise, and the mean of more "
            "would have too little; start another federation"
        }
        assert len(open_round(2)) == 1

    def test_sum_that_others_open_without_this_client_counts_for_it_too(self, open_round, tmp_path, caplog):
        """A server that never asks a client to open could else have as many sums with its update as there are pairs of others."""
        names = name_clients(9)
        with caplog.at_level(logging.INFO):
            for start in (1, 3, 5):
                sum_ = open_round(1, names=["site-00", *names[start : start + 2]], unasked="site-00")[0]
                assert "site-00" in sum_.clients
        ledger = SumLedger(tmp_path / "site-00" / LEDGER_FILE).find("f")
        assert ledger == OpenedRounds(0, "", [(1, 4.0, 1)] * 3)
        spent = compute_share_epsilon({NoiseShares(4.0, 1, 8): 3}, 1e-2)
        assert any(
            f"the 3 sums of this federation that may have it spend ε = {spent:.3f}" in one for one in caplog.messages
        )
        last = open_round(1, names=["site-00", *names[7:]], unasked="site-00")
        assert "site-00" in {answer.client_id for answer in last}
        assert any("masked its update of round 1 as often as it does" in answer.reason for answer in last)

    @pytest.mark.parametrize(
        ("first", "second", "reason"),
        [
            (4.0, 0.0, "were with noise of the clients, and this one is without"),
            (0.0, 4.0, "were without noise .* is with;"),
        ],
    )
    def test_server_can_not_turn_noise_off_or_on_between_rounds(self, open_round, first, second, reason):
        """The ε that the log tells would be that of some sums alone."""
        assert len(open_round(1, noise=first)) == 1
        assert all(re.search(reason, answer.reason) for answer in open_round(2, noise=second))
        assert len(open_round(2, noise=first)) == 1

    def test_log_promises_what_holds_for_the_sum_with_the_fewest_colluders(self, open_round, caplog):
        with caplog.at_level(logging.INFO):
            open_round(1, colluders=0)
            open_round(2, colluders=1)
        lines = [record.message for record in caplog.records if "share of the noise" in record.message]
        assert "If no more than 0 of the others help the server, the 2 sums" in lines[-1]

    def test_noise_that_can_not_be_accounted_for_is_not_added(self, open_round, monkeypatch):
        monkeypatch.setitem(sys.modules, "dp_accounting", None)
        assert "needs dp-accounting" in open_round(1)[0].reason

    def test_without_noise_nothing_is_said(self, open_round, caplog):
        with caplog.at_level(logging.INFO):
            open_round(1, noise=0.0)
        assert "share of the noise" not in caplog.text
