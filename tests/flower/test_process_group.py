# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Process groups are ended as a whole, and by whoever comes next."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fedlpp_hf.flower.process_group import run_group


class TestRunGroup:
    @pytest.fixture
    def group(self, tmp_path):
        """A leader that is killed, and what it started in its group: as a SuperNode with its ClientApp, and another."""
        code = "import subprocess, sys, time; [subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', word])"
        code += " for word in ('flwr-clientapp', 'something')]; time.sleep(600)"
        leader = subprocess.Popen([sys.executable, "-c", code, "flower-supernode"], start_new_session=True)
        (tmp_path / "supernode.pid").write_text(str(leader.pid))
        while len(self.list_group(leader.pid)) < 3:
            time.sleep(0.05)
        leader.kill()
        leader.wait()
        yield leader.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)

    def list_group(self, group):
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pgid=", "-o", "stat=", "-o", "args="], capture_output=True, text=True
        )
        lines = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return [line[2].split()[-1] for line in lines if line[0] == str(group) and line[1][0] != "Z"]

    def test_what_a_killed_one_left_is_ended_by_the_next(self, tmp_path, group):
        assert sorted(self.list_group(group)) == ["flwr-clientapp", "something"]
        command = [sys.executable, "-c", "import time; time.sleep(600)", "flower-supernode"]
        with run_group(command, dict(os.environ), tmp_path / "log", tmp_path / "supernode.pid") as process:
            assert self.list_group(group) == ["something"]
            assert (tmp_path / "supernode.pid").read_text() == str(process.pid) != str(group)
            with (
                pytest.raises(ValueError, match="is in use"),
                run_group(command, dict(os.environ), tmp_path / "log", tmp_path / "supernode.pid"),
            ):
                pass
            assert process.poll() is None
        assert process.poll() == -signal.SIGTERM and not (tmp_path / "supernode.pid").exists()

    def test_one_that_does_not_end_is_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fedlpp_hf.flower.process_group._END_SECONDS", 1.0)
        code = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
        )
        command = [sys.executable, "-c", code, "flower-supernode"]
        with run_group(command, dict(os.environ), tmp_path / "log", tmp_path / "supernode.pid") as process:
            while not (tmp_path / "log").read_text():
                time.sleep(0.05)
        assert process.poll() == -signal.SIGKILL
