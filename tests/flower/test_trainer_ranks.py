# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client whose trainer is several processes."""

import contextlib
import os
import sys
import time
from pathlib import Path

import pytest

from fedlpp_hf.flower.base_transfer import read_fingerprint
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.flower.local_trainer import ask_trainer, stop_trainer
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate


pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found in /proc")
def test_trainer_of_two_processes(tmp_path, write_config, rows, llama_base, monkeypatch):
    """`fedlpp-hf client --processes 2`, but by torchrun, as `accelerate launch` without GPUs runs one process."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    config, data, state = str(write_config()), str(rows / "site-1.jsonl"), str(tmp_path / "state")
    settings = ClientSettings(
        config, data, "site-1", state, str(tmp_path / "cache"), launch=launch, parent=os.getpid()
    )

    def find_processes():
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # gone meanwhile
                command = path.read_text(errors="replace")
                found += "fedlpp_hf.flower.trainer_process" in command and str(tmp_path) in command
        return found

    task = ClientTask("federation", 1, 3, "site-1", 0, read_fingerprint(llama_base), proxy=None)
    updates = []
    try:
        for _ in range(2):
            updates.append(ask_trainer(settings, llama_base, "train", task.to_bytes(), 200.0)[1])
        assert find_processes() == 3  # the launcher and two
    finally:
        stop_trainer(settings)
    assert updates[0] == updates[1] and ClientUpdate.from_bytes(updates[0]).num_examples == 9
    deadline = time.monotonic() + 60
    while find_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
