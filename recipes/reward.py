# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated training of a reward model (TRL's `RewardTrainer`).

    pip install -c constraints.txt ".[trl]"
    accelerate launch recipes/reward.py --config recipes/configs/reward.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. The metrics are the loss of
Bradley and Terry (ln 2 for a model that can't tell), and the share of pairs in which the chosen answer scores higher.

Rows are what TRL takes: `chosen` and `rejected`, as text or chats, with or without a `prompt`. The model may be a language model
or an encoder: its head for one score is new, and trained in full beside the adapter. This script is the clients' side: if
`model_name_or_path` names the owner's full model, a separate owner process opens it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from fedlpp_hf import FederatedConfig, FederatedMixin, parse_args


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(
        metadata={"help": "The owner's full model, or a base made by `fedlpp-hf quantize`."}
    )
    train_data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file: the clients' rows."})
    eval_data: str = field(metadata={"help": "As train_data: the rows that every round is evaluated on."})
    owner_data: str | None = field(
        default=None, metadata={"help": "As train_data: the owner's rows, which choose λ and the round to publish."}
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, if it is on the Hub."})
    owner_split: str = field(default="train", metadata={"help": "Split of owner_data, if it is on the Hub."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on this many rows, drawn at random."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Linear layers that get an adapter."}
    )


@dataclass
class FederatedRewardConfig(RewardConfig, FederatedConfig):
    """TRL's options and the federation's."""


class FederatedRewardTrainer(FederatedMixin, RewardTrainer):
    """TRL's trainer; its `train()` runs the federation."""


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedRewardConfig))

    def read(source: str, split: str, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            return rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))

    targets = arguments.target_modules
    trainer = FederatedRewardTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=read(arguments.train_data, arguments.train_split),
        eval_dataset=read(arguments.eval_data, arguments.eval_split, arguments.max_eval_rows),
        selection_dataset=read(arguments.owner_data, arguments.owner_split) if arguments.owner_data else None,
        processing_class=AutoTokenizer.from_pretrained(arguments.model_name_or_path),
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS,  # the new head is trained, too
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
