# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated text classification, over Flower (where `federation.yaml` names this file) or in one process.

    fedlpp-hf server --config recipes/flower/federation.yaml --full_model out/owner --eval_data out/docstrings/test.jsonl
    fedlpp-hf client --config recipes/flower/federation.yaml --data rows.jsonl --certificate ca.crt

    python recipes/flower/text_task.py DIRECTORY_OF_ROWS --config recipes/flower/federation.yaml \
        --full_model out/owner --eval_data out/docstrings/test.jsonl --output_dir out/in-process

Hardware: two CPU cores. Expected: both ways end in bit-identical adapters; recipes/flower/loopback.py compares them.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.flower.loading import load_rows, load_trainer


# The order of sums, and so the last bits, depends on the number of threads: use the same on every machine.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@dataclass
class TextArguments:
    eval_data: str | None = field(
        default=None, metadata={"help": "Rows on which the owner evaluates; a flag of the server."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; more are cut off."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(default_factory=lambda: ["query", "value"])


def make_trainer(
    arguments: TextArguments, args: FederatedConfig, model: str, train_dataset: dict[str, Dataset]
) -> FederatedTrainer:
    # The base includes tokenizer and class names, so a client needs nothing else from the owner.
    tokenizer = AutoTokenizer.from_pretrained(model)
    label2id = AutoConfig.from_pretrained(model).label2id

    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        labels = [label2id[label] if isinstance(label, str) else label for label in batch["label"]]
        return tokenizer(batch["text"], truncation=True, max_length=arguments.max_length) | {"label": labels}

    def prepare(rows: Dataset) -> Dataset:
        return rows.map(tokenize, batched=True, remove_columns=[name for name in rows.column_names if name != "label"])

    return FederatedTrainer(
        model=model,
        args=args,
        train_dataset={client: prepare(rows) for client, rows in train_dataset.items()},
        eval_dataset=prepare(load_rows(arguments.eval_data)) if arguments.eval_data else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_accuracy,
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.target_modules,
        ),
        model_class=AutoModelForSequenceClassification,
    )


# The owner's process uses it, too: it travels there by value.
def compute_accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def main(rows: str, config: str, *flags: str) -> None:
    datasets = {path.stem: load_rows(path) for path in sorted(Path(rows).glob("*.jsonl"))}
    trainer, _ = load_trainer(config, flags, model=None, train_dataset=datasets)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--config":
        raise SystemExit(__doc__)
    main(sys.argv[1], *sys.argv[3:])
