# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the owner sees of the rounds and does to them, without models: the server, and clients that wait for the test."""

import contextlib
import json
import threading
import time

import pytest

from fedlpp_hf.processes.control import ask
from fedlpp_hf.report.status import summarize_status
from fedlpp_hf.trainer.steering import Steering
from fedlpp_hf.wire.messages import ClientFailure
from tests.server.small_server import CLIENTS, answer, make_server


class Federation:
    """Rounds in a thread; each client's run ends when the test says so."""

    def __init__(self, output_dir, network=None, **options):
        self.server = make_server(output_dir, num_rounds=4, min_clients=2, **options)
        self.steering = Steering(self.server.args)
        self.server.on_round = self.steering.on_round
        self.network, self.attended = network, 0
        self.go, self.asked = threading.Semaphore(0), []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.ready, self.error = threading.Event(), None

    def run(self):
        try:
            with self.steering.listen(self.network, self.attend if self.network else None):
                self.ready.set()
                self.steering.follow(self.server, False)
                self.server.run(self.train)
                self.steering.finish()
        except Exception as error:
            self.error = error
            self.ready.set()

    def attend(self):
        self.attended += 1

    def train(self, tasks):
        self.steering.begin_round(tasks)
        self.asked.append([task.client_id for task in tasks])
        for task in tasks:
            if self.network is None:
                self.steering.begin_client(task.client_id)
            self.go.acquire()
            self.steering.end_client(task.client_id)
            yield ClientFailure("b", "no memory\nleft") if task.client_id == "b" and task.round == 2 else answer(task)

    def command(self, name, **values):
        return ask(self.server.store.root, name, **values)

    def wait_for(self, **expected):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            seen = self.command("status")
            if all(seen[name] == value for name, value in expected.items()):
                return seen
            time.sleep(0.01)
        raise AssertionError(seen)

    def end_round(self):
        self.go.release(len(CLIENTS))


@pytest.fixture
def begin():
    """A function that begins a [`Federation`]; it is brought to its end afterwards."""
    begun = []

    def begin(*arguments, **options):
        federation = Federation(*arguments, **options)
        begun.append(federation)
        federation.thread.start()
        assert federation.ready.wait(30)
        return federation

    yield begin
    for federation in begun:
        federation.go.release(1000)
        with contextlib.suppress(ValueError):
            federation.steering.resume()
        federation.thread.join(30)
        assert not federation.thread.is_alive()


def test_status_of_a_round(begin, tmp_path):
    federation = begin(tmp_path)
    federation.go.release(1)
    seen = federation.wait_for(phase="round", round=1)
    seen = federation.wait_for(round=1) if seen["asked"]["a"]["state"] == "answered" else seen
    while (states := {client: entry["state"] for client, entry in seen["asked"].items()})["b"] != "training":
        seen = federation.command("status")
    assert states == {"a": "answered", "b": "training", "c": "queued"}
    assert seen["asked"]["a"]["seconds"] >= 0 and seen["asked"]["c"]["seconds"] is None
    assert seen["rows"] == CLIENTS and seen["committed"] == 0 and not seen["pausing"] and seen["here"] is None
    assert seen["process"]["pid"] and seen["asked"]["b"]["bytes_down"] > 0
    federation.go.release(1 + 2 + 3)  # the rest of round 1, round 2, and the first client of round 3
    federation.wait_for(phase="round", round=3)
    status = summarize_status({}, federation.server.store.records(), federation.command("status"))
    by_id = {client["id"]: client for client in status["clients"]}
    assert by_id["b"]["refused"] == 1 and by_id["b"]["reason"] == "no memory left" and by_id["b"]["reason_round"] == 2
    assert by_id["b"]["accepted"] == 1 and by_id["a"]["accepted"] == 2


def test_pause_waits_and_goes_on(begin, tmp_path):
    federation = begin(tmp_path)
    federation.wait_for(phase="round", round=1)
    with pytest.raises(ValueError, match="not paused"):
        federation.command("resume")
    assert federation.command("pause") == {"round": 1}
    assert federation.command("pause") == {"round": 1}  # twice is once
    federation.go.release(1000)
    federation.wait_for(phase="paused", committed=1)
    time.sleep(0.7)
    assert federation.command("status")["committed"] == 1
    assert federation.command("resume") == {"round": 2}
    federation.thread.join(30)
    assert federation.server.store.latest() == 4 and federation.command("status") is None


def test_stop_ends_a_pause(begin, tmp_path):
    federation = begin(tmp_path)
    federation.wait_for(phase="round", round=1)
    federation.command("pause")
    federation.end_round()
    federation.wait_for(phase="paused")
    assert federation.command("stop") == {"round": 1}
    federation.thread.join(30)
    assert federation.server.store.latest() == 1 and federation.error is None


def test_drop_and_take_back(begin, tmp_path):
    federation = begin(tmp_path)
    federation.wait_for(phase="round", round=1)
    with pytest.raises(ValueError, match="'d' is no client of this federation"):
        federation.command("drop", client="d")
    with pytest.raises(ValueError, match="'a' is not dropped; dropped are: none"):
        federation.command("drop", client="a", undo=True)
    assert federation.command("drop", client="b") == {"dropped": ["b"], "next_round": 2}
    assert federation.server.store.read_dropped() == ["b"]  # at once: a restart knows it
    with pytest.raises(ValueError, match=r"Without the dropped clients \(a, b\), round 2 would ask 1; min_clients=2"):
        federation.command("drop", client="a")
    federation.end_round()
    federation.wait_for(phase="round", round=2)
    assert federation.command("drop", client="b", undo=True) == {"dropped": [], "next_round": 3}
    federation.go.release(1000)
    federation.thread.join(30)
    assert federation.asked == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"command": "shutdown"}, "'shutdown' is no command; expected drop, status, stop, pause, resume"),
        ({}, "None is no command"),
        ({"command": ["status"]}, "is no command"),
        ({"command": "drop"}, "`drop` needs a `client`, which is text"),
        ({"command": "drop", "client": 1}, "`drop` needs a `client`"),
        ({"command": "drop", "client": "a", "undo": "yes"}, "`drop` needs a `client`"),
        ({"command": "drop", "client": "a"}, "The rounds have not begun"),
        ({"command": "stop"}, "No round of this run has begun"),
        ({"command": "resume"}, "not paused"),
    ],
)
def test_commands_that_can_not_be_carried_out(tmp_path, request_, message):
    with pytest.raises(ValueError, match=message):
        Steering(make_server(tmp_path).args).handle(request_)


def test_pause_before_the_first_round_and_with_it_nobody_is_asked(begin, tmp_path):
    """Over a network: nodes are attended to while the federation is paused, and seen."""
    network = {"here": ["a", "c"], "refused_nodes": {"17": "its key was withdrawn"}}
    steering = Steering(make_server(tmp_path / "other").args)
    with steering.listen(lambda: network, lambda: None):
        assert steering.describe()["phase"] == "joining" and steering.describe()["here"] == ["a", "c"]
        steering.pause()
    federation = begin(tmp_path / "out", network=lambda: network)
    federation.wait_for(phase="round", round=1)
    seen = federation.command("status")
    assert set(seen["asked"]) <= set(CLIENTS) and "queued" not in {entry["state"] for entry in seen["asked"].values()}
    federation.command("pause")
    federation.end_round()
    federation.wait_for(phase="paused")
    deadline = time.monotonic() + 20
    while federation.attended < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert federation.attended >= 2
    status = summarize_status({}, federation.server.store.records(), federation.command("status"))
    assert [client["state"] for client in status["clients"]] == ["idle", "away", "idle"]
    assert status["refused_nodes"] == network["refused_nodes"]


def test_launch_of_several_processes_can_not_be_paused(tmp_path, monkeypatch):
    steering = Steering(make_server(tmp_path).args)
    monkeypatch.setattr(type(steering.args), "world_size", 2)
    with pytest.raises(ValueError, match="2 processes, which wait for each other.*ddp_timeout.*Use `fedlpp-hf stop`"):
        steering.pause()


def test_second_run_in_a_directory_is_refused_and_leaves_the_first_alone(begin, tmp_path):
    first = begin(tmp_path)
    first.wait_for(phase="round")
    second = Federation(tmp_path)
    second.run()
    assert "Another process is running a federation in" in str(second.error)
    assert first.command("status")["phase"] == "round"


def test_what_was_asked_for_is_kept_while_it_listens(tmp_path):
    """The log and the monitor end with the run."""
    log = tmp_path / "run.jsonl"
    steering = Steering(make_server(tmp_path / "out", log_json=str(log)).args)
    with steering.listen():
        with steering.listen():  # within itself it changes nothing
            steering.handle({"command": "pause"})
        steering.handle({"command": "resume"})
    steering.handle({"command": "pause"})
    assert log.read_text().count("The owner's command") == 2
    assert steering.describe_health() == (True, "starting")
    with pytest.raises(RuntimeError), steering.listen():
        raise RuntimeError("too few clients")
    line = json.loads(log.read_text().splitlines()[-1])
    assert line["message"] == "The run ends early: RuntimeError: too few clients" and "Traceback" in line["traceback"]
