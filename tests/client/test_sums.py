# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ledger of a client's sums: a round is opened for one set of survivors, and no round before the last."""

import stat

import pytest

from fedlpp_hf.client.sums import LEDGER_FILE, SumLedger
from fedlpp_hf.privacy.secure_sums.client import RefusedError


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
    for call in (lambda: ledger.check_round("f", 2), lambda: ledger.enter("f", 2, "these")):
        with pytest.raises(RefusedError, match="open the sum of round 3 .*takes no part in round 2 again"):
            call()
    ledger.check_round("f", 3)
    ledger.enter("g", 1, "these")  # another federation
    ledger.check_round("f", 4)


def test_damaged_ledger_opens_nothing(ledger):
    for text in ("{", "[]", '{"f": 3}', '{"f": [null, null]}'):
        ledger.file.write_text(text)
        with pytest.raises(RefusedError, match="ledger of sums is damaged"):
            ledger.enter("f", 9, "these")


def test_ledger_is_for_its_user_alone(ledger):
    ledger.enter("f", 1, "these")
    assert stat.S_IMODE(ledger.file.stat().st_mode) == 0o600
