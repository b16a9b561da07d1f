# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Logs that other processes append to are kept small while these go on."""

import stat
import subprocess
import sys
import time

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.flower import log_files
from fedlpp_hf.flower.log_files import empty_if_long, keep_small


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(log_files, "MAX_BYTES", 10_000)
    monkeypatch.setattr(log_files, "_LOOK_SECONDS", 0.02)


def test_writer_goes_on_in_the_same_file(tmp_path):
    log = tmp_path / "superlink.log"
    code = "import time\nfor n in range(400): print(n, 'x' * 100, flush=True); time.sleep(0.002)"
    with open(log, "ab") as file:
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=file)
    sizes = []
    with keep_small(log, tmp_path / "absent.log"):
        while writer.poll() is None:
            sizes.append(log.stat().st_size)
            time.sleep(0.01)
        time.sleep(0.1)
    assert max(sizes) < 40_000 and log.stat().st_size <= 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"superlink.log", "superlink.log.1"}
    text = (tmp_path / "superlink.log.1").read_text() + log.read_text()
    assert "\0" not in text and text.splitlines()[-1].startswith("399 ")  # no hole where the file was emptied


def test_short_log_is_left_alone_and_modes_are_kept(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10_000)
    empty_if_long(log)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    log.write_bytes(b"y" * 10_001)
    log.chmod(0o600)
    empty_if_long(log)
    assert log.read_bytes() == b"" and (tmp_path / "log.1").read_bytes() == b"y" * 10_001
    assert stat.S_IMODE((tmp_path / "log.1").stat().st_mode) == 0o600


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_bytes(b"y" * 20_000)

    def fail(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_files.shutil, "copy", fail)
    with pytest.raises(OSError, match="No space left"):
        empty_if_long(log)
    assert log.stat().st_size == 20_000 and [path.name for path in tmp_path.iterdir()] == ["log"]
    with keep_small(log):
        time.sleep(0.1)
    assert log.stat().st_size == 20_000
