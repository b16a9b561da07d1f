# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation of eight rounds that is slow enough to be interrupted. Run by test_processes.py."""

import sys
import time

import torch
from peft import LoraConfig

from fedlpp_hf import FederatedTrainer, load_base
from tests.conftest import make_rows
from tests.test_trainer import make_args


class Slow(FederatedTrainer):
    def train_client(self, task):
        time.sleep(0.1)
        return super().train_client(task)


def main(base: str, output_dir: str, resume: str = "") -> None:
    torch.set_num_threads(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = Slow(load_base(base), make_args(output_dir, num_rounds=8), train_dataset=make_rows(), peft_config=lora)
    trainer.train(resume_from_checkpoint=bool(resume))


if __name__ == "__main__":
    main(*sys.argv[1:])
