# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a rank of two does in test_processes.py: `python -m tests.integration.ending_ranks RANK DIRECTORY TIMES`.

It hears its last word and ends, so often that a race of some microseconds is met: gloo's thread frees what it sent while the
process group is destroyed.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fedlpp_hf.trainer.ranks import broadcast_bytes


def hear_and_end(init_method: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))  # frees the process group in its own end
    assert broadcast_bytes(None if rank else b"stop", torch.device("cpu")) == b"stop"
    dist.destroy_process_group()
    del model


if __name__ == "__main__":
    for number in range(int(sys.argv[3])):
        hear_and_end(f"file://{sys.argv[2]}/{number}", int(sys.argv[1]))
