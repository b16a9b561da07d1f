# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trainer's process: started on demand, replaced, stopped."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from fedlpp_hf.flower import local_trainer
from fedlpp_hf.flower.local_trainer import TRAINER, ask_trainer, call_trainer, find_trainer, stop_trainer
from fedlpp_hf.flower.process_group import runs_command
from fedlpp_hf.processes import local_socket


class TestTrainerProcess:
    """The same as a process, which nobody but `ask_trainer` starts; what it holds is a stub, so that it starts at once."""

    SCRIPT = """
import sys, time
from types import SimpleNamespace
from fedlpp_hf.flower import trainer_process
from fedlpp_hf.flower.base_transfer import read_fingerprint
from fedlpp_hf.flower.client_settings import ClientSettings

def train(trainer, task):
    time.sleep(60 if task == b"long" else 0)
    return task

_, _, module, settings, base = sys.argv
trainer_process.train_task = train
fingerprint = read_fingerprint(base)
trainer = SimpleNamespace(
    client_datasets={"site": range(7)}, guard=SimpleNamespace(fingerprint=fingerprint), share=lambda *args: None
)
trainer_process.TrainerService(ClientSettings.read(settings), trainer).serve()
"""

    @pytest.fixture
    def parent(self):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield process
        process.kill()
        process.wait()

    @pytest.fixture
    def settings(self, settings, parent, tmp_path, monkeypatch):
        (tmp_path / "trainer.py").write_text(self.SCRIPT)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        settings = replace(settings, launch=[sys.executable, str(tmp_path / "trainer.py")], parent=parent.pid)
        settings.key_file.unlink()  # made at the first start
        yield settings
        stop_trainer(settings)

    def ask_pid(self, settings, base_dir):
        return ask_trainer(settings, base_dir, "status")[0]["pid"]

    def assert_ends(self, pid):
        deadline = time.monotonic() + 60
        while runs_command(str(pid), TRAINER):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def test_starts_on_demand_and_stays(self, settings, base_dir):
        assert not settings.socket_file.exists()
        pid = self.ask_pid(settings, base_dir)
        assert pid != os.getpid() and self.ask_pid(settings, base_dir) == pid
        assert ask_trainer(settings, base_dir, "train", b"task")[1] == b"task"
        assert stat.S_IMODE(settings.key_file.stat().st_mode) == 0o600
        stop_trainer(settings)
        self.assert_ends(pid)
        assert not settings.socket_file.exists() and not settings.pid_file.exists()

    def test_starts_again_after_a_crash(self, settings, base_dir):
        pid = self.ask_pid(settings, base_dir)
        os.kill(pid, signal.SIGKILL)
        self.assert_ends(pid)
        assert self.ask_pid(settings, base_dir) != pid

    @pytest.mark.slow
    def test_one_that_does_not_answer_is_replaced(self, settings, base_dir, monkeypatch):
        pid = self.ask_pid(settings, base_dir)
        os.kill(pid, signal.SIGSTOP)
        # In earnest it is given half a minute.
        monkeypatch.setattr(local_socket, "CALL_TIMEOUT", 2.0)
        monkeypatch.setattr(local_trainer, "CALL_TIMEOUT", 2.0)
        assert find_trainer(settings) is None
        assert self.ask_pid(settings, base_dir) != pid
        self.assert_ends(pid)

    def test_another_base_is_another_trainer(self, settings, base_dir, tmp_path):
        pid = self.ask_pid(settings, base_dir)
        other = tmp_path / "other"
        other.mkdir()
        (other / "base_manifest.json").write_text(json.dumps({"fingerprint": "b" * 64}))
        status, _ = ask_trainer(settings, other, "status")
        assert status["pid"] != pid and status["base"] == "b" * 64
        self.assert_ends(pid)

    def test_stops_in_the_middle_of_a_task(self, settings, base_dir, monkeypatch):
        monkeypatch.setattr(local_trainer, "CALL_TIMEOUT", 1.0)
        pid = self.ask_pid(settings, base_dir)
        errors = []

        def ask():
            try:
                call_trainer(settings, "train", b"long", 60)
            except (OSError, EOFError) as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.5)
        stop_trainer(settings)
        thread.join(timeout=30)
        assert errors
        self.assert_ends(pid)

    def test_ends_with_its_parent(self, settings, base_dir, parent):
        pid = self.ask_pid(settings, base_dir)
        parent.kill()
        parent.wait()
        self.assert_ends(pid)


class TestStopTrainer:
    @pytest.fixture
    def start(self, settings):
        processes = []

        def start(*words):
            processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]))
            settings.pid_file.write_text(str(processes[0].pid))
            return processes[0]

        yield start
        processes[0].kill()
        processes[0].wait()

    def test_kills_one_that_does_not_listen(self, start, settings):
        trainer = start(TRAINER)
        stop_trainer(settings)  # though nobody has asked for its exit code yet
        assert trainer.wait(timeout=0) == -signal.SIGKILL and not settings.pid_file.exists()

    def test_spares_another_that_got_the_id(self, start, settings):
        other = start()
        stop_trainer(settings)
        assert other.poll() is None and not settings.pid_file.exists()
