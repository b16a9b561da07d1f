# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Kills, power cuts and full disks at the operations on files of all work; the long form is `python -m benchmarks.kills`."""

import random
import sys
from pathlib import Path

import pytest

from benchmarks import kills
from fedlpp_hf.server import store
from fedlpp_hf.tensors import atomic
from tests.kill_cases import CASES
from tests.trials import Trials


pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11) or not Path("/proc/self/fd").exists(),
    reason="pathlib of Python 3.10 has bound os's functions; descriptors are looked up in Linux's /proc",
)


def explain(outcomes):
    return "\n".join(str(outcome) for outcome in outcomes if not outcome.is_clean)


def test_killed_rounds_are_resumed_bit_for_bit(tmp_path):
    outcomes = kills.run(20, 1, ["rounds"])
    assert sum(outcome.kills for outcome in outcomes) >= 20 and not explain(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"rounds"}))
def test_whatever_was_killed_is_finished_bit_for_bit(name):
    outcomes = kills.run(3 if name == "training" else 12, 2, [name])
    assert not explain(outcomes)


def test_shares_are_of_all_cases():
    assert kills.SHARES.keys() == CASES.keys() and sum(kills.SHARES.values()) == 100
    chosen = [kills.choose_case(0, number, list(CASES))[0] for number in range(300)]
    assert set(chosen) == set(CASES)
    assert chosen == [kills.choose_case(0, number, list(CASES))[0] for number in range(300)]


def test_csv_continues_where_it_ended(tmp_path):
    file = tmp_path / "kills.csv"
    first = kills.run(3, 0, ["marks"], file)
    second = kills.run(6, 0, ["marks"], file)
    assert [outcome.number for outcome in first + second] == list(range(len(first) + len(second)))
    assert kills.run(6, 0, ["marks"], file) == []


def write_in_place(path, data, mode=0o666):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("mode", "module", "name", "replacement"),
    [
        ("kill", store, "write_atomically", write_in_place),  # half a record
        ("cut", store, "sync_path", lambda path: None),  # a record on disk before the tensors that it counts on
        ("cut", atomic, "sync_path", lambda path: None),  # a name on disk before its file
    ],
)
def test_broken_promise_is_found(tmp_path, monkeypatch, mode, module, name, replacement):
    trials = Trials(CASES["rounds"], tmp_path)
    monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr("tests.trials.MODES", (mode,))
    assert any(not trials.run(number, random.Random(number)).is_clean for number in range(40))
