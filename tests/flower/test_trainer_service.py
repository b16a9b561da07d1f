# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trainer's service: what it answers on its socket, and whom it does not answer."""

import os
import signal
import socket
import stat
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedlpp_hf.flower import local_trainer, trainer_process
from fedlpp_hf.flower.local_trainer import ask_trainer, call_trainer, find_trainer, stop_trainer
from fedlpp_hf.flower.trainer_process import TrainerService
from tests.helpers import FINGERPRINT


@pytest.fixture
def service(settings, monkeypatch):
    """A trainer that answers every task with the task, in a thread instead of a process."""
    trainer = SimpleNamespace(
        client_datasets={"site": range(7)},
        guard=SimpleNamespace(fingerprint=FINGERPRINT),
        share=lambda *args: None,
    )

    def train(trainer, task):
        if task == b"bad":
            raise ValueError("no task")
        return b"update of " + task

    monkeypatch.setattr(trainer_process, "train_task", train)
    thread = threading.Thread(target=TrainerService(settings, trainer).serve)
    thread.start()
    while find_trainer(settings) is None:
        assert thread.is_alive(), "the service ended before it answered"
        time.sleep(0.01)
    yield
    stop_trainer(settings)
    thread.join(timeout=10)
    assert not thread.is_alive() and not settings.socket_file.exists()


class TestTrainerService:
    def test_answers(self, settings, service, base_dir):
        status, _ = ask_trainer(settings, base_dir, "status")
        assert status == {"clients": {"site": 7}, "base": FINGERPRINT, "pid": os.getpid()}
        assert ask_trainer(settings, base_dir, "train", b"task")[1] == b"update of task"

    def test_failure_is_told_and_survived(self, settings, service, base_dir):
        with pytest.raises(RuntimeError, match="ValueError; the client.s log has its text under [0-9a-f]{8}"):
            ask_trainer(settings, base_dir, "train", b"bad")
        assert ask_trainer(settings, base_dir, "train", b"good")[1] == b"update of good"

    def test_hanging_trainer_is_ended(self, settings, service, base_dir, monkeypatch):
        ended, release = [], threading.Event()
        monkeypatch.setattr(trainer_process, "train_task", lambda trainer, task: release.wait(30) and b"late")
        monkeypatch.setattr(local_trainer.os, "kill", lambda pid, how: ended.append((pid, how)))
        with pytest.raises(RuntimeError, match="did not answer within 0 s"):
            ask_trainer(settings, base_dir, "train", b"task", timeout=0.2)
        release.set()
        assert (os.getpid(), signal.SIGKILL) in ended

    @pytest.mark.parametrize("deaths", [1, 2])
    def test_trainer_that_dies_during_a_task_is_started_once_more(self, deaths, settings, base_dir, monkeypatch):
        starts, answers = [], [EOFError()] * deaths + [({}, b"update")]

        def call(*arguments):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(local_trainer, "call_trainer", call)
        monkeypatch.setattr(local_trainer, "ensure_trainer", lambda *arguments: starts.append(1))
        settings.log_file.write_text("Killed\n")
        if deaths == 1:
            assert ask_trainer(settings, base_dir, "train", b"task")[1] == b"update"
        else:
            with pytest.raises(RuntimeError, match="died twice during one task.*Killed"):
                ask_trainer(settings, base_dir, "train", b"task")
        assert len(starts) == 2

    def test_socket_is_the_users_alone(self, settings, service):
        assert stat.S_IMODE(settings.socket_file.stat().st_mode) == 0o600
        assert stat.S_IMODE(settings.socket_file.parent.stat().st_mode) == 0o700

    def test_wrong_key_is_refused(self, settings, service):
        settings.key_file.write_bytes(b"x" * 32)
        with pytest.raises((EOFError, OSError)):
            call_trainer(settings, "status", b"", 5)
        settings.key_file.write_bytes(b"k" * 32)

    def test_garbage_does_not_end_it(self, settings, service, base_dir):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(settings.socket_file))
            connection.sendall(b"\xff" * 1000)
        assert ask_trainer(settings, base_dir, "status")[0]["base"] == FINGERPRINT

    def test_key_that_others_can_read_is_refused(self, settings):
        settings.key_file.chmod(0o644)
        with pytest.raises(RuntimeError, match="can be read by others"):
            TrainerService(settings, None)

    def test_shared_runtime_directory_is_refused(self, settings, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        (tmp_path / f"fedlpp-{os.getuid()}").mkdir()
        (tmp_path / f"fedlpp-{os.getuid()}").chmod(0o755)
        with pytest.raises(RuntimeError, match="this user alone"):
            _ = settings.socket_file

    def test_ends_with_its_parent(self, settings, monkeypatch):
        monkeypatch.setattr(trainer_process, "is_alive", lambda pid: False)
        settings = replace(settings, parent=os.getpid())
        TrainerService(settings, SimpleNamespace(share=lambda *args: None)).serve()
        assert not settings.socket_file.exists()

    def test_trainer_that_does_not_start_tells_why(self, settings, base_dir):
        settings = replace(settings, launch=[sys.executable, "-c", "raise SystemExit('no room')"])
        with pytest.raises(RuntimeError, match=r"did not start.*no room"):
            ask_trainer(settings, base_dir, "status")
