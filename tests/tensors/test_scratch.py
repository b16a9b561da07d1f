# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What is not finished has a lock, and goes with the next process when its own was killed."""

import fcntl
import os
import subprocess
import sys

import pytest

from fedlpp_hf.tensors import scratch
from fedlpp_hf.tensors.scratch import temporary_directory, working_directory
from tests.helpers import ROOT


# Enters the block that is given, writes a file, tells where, and is killed there.
KILLED = """
import os, pathlib, signal
from fedlpp_hf.tensors.scratch import temporary_directory, working_directory
with {block} as work:
    (work / "half").write_text("written")
    print(work, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_until_killed(block: str, environment: dict[str, str] | None = None) -> str:
    script = [sys.executable, "-c", KILLED.format(block=block)]
    run = subprocess.run(script, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)
    assert run.returncode == -9
    return run.stdout.strip()


def test_working_directory_is_gone_after_success_and_failure(tmp_path):
    with working_directory(tmp_path / "new" / "out", "writing") as work:
        (work / "file").touch()
        assert os.listdir(tmp_path / "new") == [".out.writing"]
    with pytest.raises(ZeroDivisionError), working_directory(tmp_path / "new" / "out", "writing"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "new") == []


def test_working_directory_that_got_a_name_stays(tmp_path):
    with working_directory(tmp_path / "out", "writing") as work:
        (work / "file").touch()
        work.rename(tmp_path / "out")
        work.mkdir()  # another process's, by now
    assert sorted(os.listdir(tmp_path)) == [".out.writing", "out"]
    assert os.listdir(tmp_path / "out") == ["file"]


def test_two_at_one_place(tmp_path):
    with working_directory(tmp_path / "out", "merging into") as work:
        (work / "file").touch()
        with (
            pytest.raises(RuntimeError, match="Another process is merging into `.*out` right now"),
            working_directory(tmp_path / "out", "merging into"),
        ):
            pass
        assert os.listdir(work) == ["file"]


def test_working_directory_of_a_killed_process_is_used_again(tmp_path):
    left = run_until_killed(f"working_directory(pathlib.Path({str(tmp_path / 'out')!r}), 'writing')")
    assert os.listdir(left) == ["half"]
    with working_directory(tmp_path / "out", "writing") as work:
        assert str(work) == left and os.listdir(work) == []
    assert os.listdir(tmp_path) == []


def test_temporary_directory_of_a_killed_process_goes_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    left = run_until_killed("temporary_directory('fedlpp-owner-')", {"TMPDIR": str(tmp_path)})
    another = run_until_killed("temporary_directory('other-')", {"TMPDIR": str(tmp_path)})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "fedlpp-owner-link").symlink_to(elsewhere)
    with temporary_directory("fedlpp-owner-") as first, temporary_directory("fedlpp-owner-") as second:
        assert first.is_dir() and second.is_dir()  # who is at work is not swept away
        assert not os.path.exists(left) and os.path.isdir(another) and elsewhere.is_dir()
        assert first.stat().st_mode & 0o077 == 0
    assert not first.exists() and not second.exists()


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_directory_that_a_sweep_takes_away_is_made_again(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    real, taken = (os.open, fcntl.flock), []

    def sweep(path):
        if not taken:
            taken.append(path)
            os.rmdir(path)

    def open_late(path, flags, *more, **options):
        if moment == "before it is opened":
            sweep(path)
        return real[0](path, flags, *more, **options)

    def lock_late(descriptor, operation):
        if moment == "before it is locked":
            sweep(os.readlink(f"/proc/self/fd/{descriptor}"))
        elif moment == "while it is locked" and not taken:
            sweep(os.readlink(f"/proc/self/fd/{descriptor}"))
            raise BlockingIOError
        return real[1](descriptor, operation)

    monkeypatch.setattr(scratch.os, "open", open_late)
    monkeypatch.setattr(scratch.fcntl, "flock", lock_late)
    with temporary_directory("fedlpp-owner-") as path:
        assert path.is_dir() and str(path) not in taken and len(taken) == 1
    assert not list(tmp_path.iterdir())


def test_file_systems_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with working_directory(tmp_path / "out", "writing") as work:
        assert work.is_dir()
    assert "can't be locked" in caplog.text
