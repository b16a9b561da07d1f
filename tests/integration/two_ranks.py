# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation under `torchrun`: every rank writes the adapter it ends with. Run by test_processes.py."""

import sys

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from fedlpp_hf import FederatedConfig, FederatedTrainer, load_base
from fedlpp_hf.tensors.adapters import copy_adapter
from tests.helpers import make_rows


def main(base: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    rows = make_rows()
    args = FederatedConfig(
        output_dir, num_rounds=2, partition="client", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = FederatedTrainer(
        load_base(base), args, train_dataset=rows, eval_dataset=rows, peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )  # fmt: skip
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    adapter = copy_adapter(trainer.guard.parameters)
    adapter |= {"world_size": torch.tensor(args.world_size), "loss": torch.tensor(loss, dtype=torch.float64)}
    save_file(adapter, f"{output_dir}/rank-{args.process_index}.safetensors")
    trainer.end()  # threads of a process group that nobody destroyed can abort a rank while it exits


if __name__ == "__main__":
    main(*sys.argv[1:])
