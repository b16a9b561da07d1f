# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`status`, `stop`, `pause`, `resume` and `drop` as commands: what they print, and their exit codes."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from fedlpp_hf.processes.control import KEY_FILE, answer_commands
from fedlpp_hf.trainer.steering import Steering
from tests.helpers import ROOT, assert_fails_in_one_line
from tests.server.small_server import answer_all, make_server


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output_dir of a federation of two rounds that no process runs."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    make_server(directory).run(answer_all)
    return directory


def test_status_without_a_process(run, finished):
    code, out, err = run("status", finished)
    assert (code, err) == (0, "") and "no process is running it; 2 of 2 rounds committed" in out and "| c " in out
    assert run("status", finished / "_federation") == (0, out, "")
    status = json.loads(run("status", finished, "--json")[1])
    assert status["kind"] == "status" and [client["accepted"] for client in status["clients"]] == [2, 2, 2]
    assert run("status", finished, "--watch") == (0, out, "")  # nothing to wait for


def test_json_keys_are_those_of_the_page(run, finished):
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith("| `status`")]
    status = json.loads(run("status", finished, "--json")[1])
    assert [name for name in [*status, *status["clients"][0]] if f"`{name}`" not in row] == []


def test_watch_follows_until_the_run_ends(run, finished, monkeypatch):
    waits = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(answer_commands(finished / "_federation", Steering(make_server(finished).args).handle))

        def wait(seconds):
            waits.append(seconds)
            if len(waits) == 2:
                stack.close()

        monkeypatch.setattr("fedlpp_hf.cli.status.time.sleep", wait)
        code, out, _ = run("status", finished, "--watch", "7")
    assert code == 0 and waits == [7, 7]
    assert out.count("starting; 2 of 2 rounds committed") == 2 and out.count("no process is running it") == 1
    assert "\x1b" not in out  # it is no terminal


def allow_interrupts():
    """A shell starts what runs in the background with ^C ignored, and whatever it starts ignores it, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


COMMANDS = [("stop",), ("pause",), ("resume",), ("drop", "a")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_process_there_is_nothing_to_steer(run, finished, tmp_path, command):
    name, *rest = command
    assert_fails_in_one_line(run(name, finished, *rest), f"so there is nothing to {name}")
    assert_fails_in_one_line(run(name, tmp_path, *rest), "holds no federation (no _federation)")
    assert_fails_in_one_line(run(name, tmp_path / "absent", *rest), "absent` is not a directory")


def test_answers_of_a_process(run, finished, monkeypatch):
    heard = []

    def handle(request):
        heard.append(request)
        if request["command"] == "resume":
            raise ValueError("The federation is not paused.")
        return {"round": 4, "dropped": ["a"], "next_round": 5}

    with answer_commands(finished / "_federation", handle):
        assert run("stop", finished)[:2] == (
            0, "Round 4 is the last of this run. Then come merge and report; resume it later for the other rounds.\n"
        )  # fmt: skip
        assert run("pause", finished)[1].startswith("It waits once round 4 is committed.\nGo on: fedlpp-hf resume ")
        assert_fails_in_one_line(run("resume", finished), "The federation is not paused.")
        assert (
            run("drop", finished, "a")[1]
            == run("drop", finished, "a", "--undo")[1]
            == "From round 5 on, not asked: a.\n"
        )
        key = (finished / "_federation" / KEY_FILE).read_bytes()
        try:
            (finished / "_federation" / KEY_FILE).write_bytes(bytes(32))
            assert_fails_in_one_line(run("stop", finished), "hung up")
        finally:
            (finished / "_federation" / KEY_FILE).write_bytes(key)
    assert [request["command"] for request in heard] == ["stop", "pause", "resume", "drop", "drop"]
    assert heard[3:] == [{"command": "drop", "client": "a", "undo": undo} for undo in (False, True)]


def test_damaged_record_is_one_line(run, tmp_path):
    server = make_server(tmp_path)
    server.run(answer_all)
    path = server.store.round_dir(1) / "round.json"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": 0.1'))
    assert_fails_in_one_line(run("status", tmp_path), "Round 1: ")
    assert_fails_in_one_line(run("status", tmp_path, "--json", "--watch"), "leave --watch out")


def test_exit_codes_are_those_of_the_page(finished, tmp_path):
    """As a shell sees them, each of docs/command-line.md but the server's 1, which tests/flower has."""
    script = [sys.executable, "-m", "fedlpp_hf.cli.main"]

    def run(*arguments, **options):
        done = subprocess.run([*script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100, **options)
        return done.returncode, done.stderr.count("\n")

    assert run("status", str(finished)) == (0, 0)
    assert run("stop", str(finished)) == (2, 1)
    assert run("status", str(tmp_path)) == (2, 1)
    with answer_commands(finished / "_federation", lambda request: os.kill(caller.pid, signal.SIGINT) or {}):
        caller = subprocess.Popen(
            [*script, "stop", str(finished)], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=allow_interrupts
        )
        assert caller.communicate(timeout=60)[1] == "fedlpp-hf: interrupted\n" and caller.returncode == 130
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert all(f"\n| {code} | " in page for code in (0, 1, 2, 130, 143))
