# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation of eight rounds that can be made to wait in its third, to be interrupted. Run by test_processes.py."""

import sys
import time

import torch
from peft import LoraConfig

from fedlpp_hf import FederatedTrainer, load_base
from tests.helpers import make_args, make_rows


class Waiting(FederatedTrainer):
    def train_client(self, task):
        if task.round == 3:
            time.sleep(120)
        return super().train_client(task)


def main(base: str, output_dir: str, how: str = "") -> None:
    torch.set_num_threads(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer_class = Waiting if how == "wait" else FederatedTrainer
    args = make_args(output_dir, num_rounds=8)
    trainer = trainer_class(load_base(base), args, train_dataset=make_rows(), peft_config=lora)
    trainer.train(resume_from_checkpoint=how == "resume")


if __name__ == "__main__":
    main(*sys.argv[1:])
