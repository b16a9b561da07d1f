# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federations in several processes, and ones that are interrupted from outside."""

import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from fedlpp_hf import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import ROOT, assert_equal


def test_two_ranks_train_each_client_together(llama_base, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv-backend",
        "c10d",
    ]
    launch += ["--rdzv-endpoint", "localhost:0", "-m", "tests.integration.two_ranks", str(llama_base), str(tmp_path)]
    subprocess.run(launch, check=True, cwd=ROOT, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    assert all(int(rank.pop("world_size")) == 2 for rank in ranks)  # some launchers quietly run one process
    records = RoundStore(tmp_path).records()
    assert len(records) == 3
    losses = [record["metrics"]["proxy"]["eval_loss"] for record in records]
    # After the rounds every rank holds, and measures, what a client does.
    assert [float(rank.pop("loss")) for rank in ranks] == [losses[2]] * 2
    assert_equal(*ranks)
    assert losses[2] < losses[0]


@pytest.mark.slow
def test_ranks_end(tmp_path):
    """gloo's thread and whatever destroys the process group waited for each other, in one end of some hundred."""
    script = [sys.executable, "-m", "tests.integration.ending_ranks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*script, str(rank), str(tmp_path), "100"], cwd=ROOT, env=environment) for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_interrupted_by_signal_and_resumed(llama_base, tmp_path):
    """^C in the middle of a run: what is committed is whole, and a resumed run is bit-identical to an uninterrupted one."""
    script = [sys.executable, "-m", "tests.integration.slow_run", str(llama_base)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*script, str(tmp_path / "cut"), "wait"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with ^C ignored, and whatever it starts ignores it, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    store = RoundStore(tmp_path / "cut")
    deadline = time.monotonic() + 120
    while (store.latest() or 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert store.latest() == 2
    for output_dir, options in (("cut", ["resume"]), ("whole", [])):
        subprocess.run(
            [*script, str(tmp_path / output_dir), *options], check=True, cwd=ROOT, env=environment, timeout=120
        )
    assert_equal(*(read_adapter(tmp_path / name)[0] for name in ("cut", "whole")))
