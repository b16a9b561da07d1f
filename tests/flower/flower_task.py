# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trainer of the federations in these tests; their configurations name it as users name theirs."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fedlpp_hf import FederatedConfig, FederatedTrainer


torch.set_num_threads(1)  # sums in the order of the process that they are compared with


@dataclass
class TaskArguments:
    eval_rows: str | None = None


def make_trainer(task: TaskArguments, args: FederatedConfig, model, train_dataset) -> FederatedTrainer:
    return FederatedTrainer(
        model,
        args,
        train_dataset=train_dataset,
        eval_dataset=Dataset.from_json(task.eval_rows) if task.eval_rows else None,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        model_class=AutoModelForCausalLM,
    )


def not_a_trainer(args):
    """A function without the types that are asked for."""
