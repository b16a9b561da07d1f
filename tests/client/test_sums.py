# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ledger of a client's sums: a round is opened for one set of survivors, and no round before the last."""

import stat

import numpy as np
import pytest

from fedlpp_hf.client.sums import LEDGER_FILE, SumLedger
from fedlpp_hf.privacy.secure_sums.client import RefusedError, SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
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
