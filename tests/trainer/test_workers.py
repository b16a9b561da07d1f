# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whether clients leave cores to the owner's process."""

import os
from types import SimpleNamespace

import pytest
import torch

from fedlpp_hf.trainer.workers import leaves_cores


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system does not say which cores are this process's"
)
@pytest.mark.parametrize(
    ("cores", "owner", "workers", "threads", "ranks", "left"),
    [
        (2, "1", 1, 1, 1, True),
        (2, "1", 1, 2, 1, False),  # more threads than cores cost more than the wait
        (2, "", 1, 1, 1, False),  # the owner's process then takes all of them
        (2, "1", 2, 1, 1, False),
        (8, "2", 3, 8, 1, True),  # three workers of two
        (8, "2", 4, 1, 1, False),
        (8, "4", 1, 1, 4, True),
        (8, "4", 1, 1, 5, False),
    ],
)
def test_cores_are_counted(monkeypatch, cores, owner, workers, threads, ranks, left):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("OMP_NUM_THREADS", owner)
    args = SimpleNamespace(world_size=ranks, device=torch.device("cpu"))
    assert leaves_cores(args, workers, threads) is left
    assert not leaves_cores(SimpleNamespace(world_size=ranks, device=torch.device("cuda")), workers, threads)
