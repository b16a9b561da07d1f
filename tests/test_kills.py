# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Kills, power cuts and full disks at the operations on files of all work; the long form is `python -m benchmarks.kills`."""

import random
import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import kill_operations, kills
from fedlpp_hf.processes import service
from fedlpp_hf.server import store
from fedlpp_hf.tensors import atomic, scratch
from tests.child_faults import Plan, fork_processes
from tests.faults import KILLED
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


class WritingHandler:
    def __init__(self, directory: Path):
        self.directory = directory

    def write(self, tensors, name):
        (self.directory / name).write_text("whole")
        return {}, {}


def make_writing_handler(directory, scratch):
    return WritingHandler(directory)


@pytest.mark.parametrize(("at", "kind", "left"), [(0, "mkdir", None), (1, "open", None), (2, "write", "wh")])
def test_the_first_process_that_comes_to_the_operation_dies_in_it(tmp_path, monkeypatch, at, kind, left):
    root, folder = tmp_path / "root", tmp_path / "plan"
    for directory in (root / "tmp", folder):
        directory.mkdir(parents=True)
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(root / "tmp"))
    monkeypatch.setattr(service, "subprocess", service.subprocess)  # put back afterwards
    fork_processes(plan := Plan(str(root), str(folder), "writer", at))
    for name, dies in (("reader", False), ("writer", True), ("writer", False)):
        process = service.Service(name, make_writing_handler, root)
        if dies:
            with pytest.raises(RuntimeError, match=f"exit code {KILLED}"):
                process.ask("write", name="file")
            assert left == ((root / "file").read_text() if (root / "file").exists() else None)
        else:
            process.ask("write", name="file")
            assert (root / "file").read_text() == "whole"
        process.close()
        (root / "file").unlink(missing_ok=True)
        assert not list((root / "tmp").iterdir())
    whole = ["mkdir", "open", "write", "remove"]  # with the scratch directory at both ends
    assert plan.read_kind() == kind and sorted(plan.read_operations("writer")) == sorted([whole[: at + 1], whole])
    assert plan.read_operations("reader") == []


@pytest.mark.slow
def test_a_killed_owner_costs_nothing_and_a_worker_one_client(tmp_path):
    chance, work = random.Random(0), tmp_path / "work"
    with closing(kill_operations.Runs(tmp_path)) as runs:
        operations = {
            victim: chance.randrange(min(map(len, found))) for victim, found in runs.count_operations().items()
        }
        trial = runs.try_kill("worker", operations["worker"])
        assert trial.kind and trial.is_clean and trial.starts == 1, trial
        trial = runs.try_kill("owner", operations["owner"])
        assert trial.kind and trial.is_clean and trial.starts == 2, trial
        # A federation that is not as it should be.
        kept = kill_operations.find_records(work)
        assert len(kept) == 4
        (work / "out" / "_federation" / "base" / "config.json").write_text("{}")
        (work / "out" / ".report.tmp").touch()
        next(iter(kept)).touch()
        assert runs.compare(work, kept) == {"left_out": 0, "lost_rounds": 1, "differing": 2, "files_left": 1}
