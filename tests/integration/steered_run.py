# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation of five rounds, each of which waits until there is a file of its number. Run by test_steering.py."""

import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig

from fedlpp_hf import FederatedTrainer, load_base
from tests.helpers import make_args, make_rows


class Gated(FederatedTrainer):
    gates: Path

    def train_client(self, task):
        while not (self.gates / str(task.round)).exists():
            time.sleep(0.02)
        return super().train_client(task)


def main(base: str, output_dir: str, gates: str, resume: str, *monitoring: str) -> None:
    torch.set_num_threads(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"monitor_port": int(monitoring[0]), "log_json": monitoring[1]} if monitoring else {}
    args = make_args(output_dir, num_rounds=5, min_clients=2, **options)
    trainer = Gated(load_base(base), args, train_dataset=make_rows(), eval_dataset=make_rows(8), peft_config=lora)
    trainer.gates = Path(gates)
    trainer.train(resume_from_checkpoint=resume == "resume")


if __name__ == "__main__":
    main(*sys.argv[1:])
