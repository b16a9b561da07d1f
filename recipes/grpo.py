# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated reinforcement learning of a language model by a reward function (TRL's `GRPOTrainer`).

    pip install -c constraints.txt ".[trl]"
    accelerate launch recipes/grpo.py --config recipes/configs/grpo.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. The metric is the mean reward of
sampled answers; the loss says nothing here.

Rows have a `prompt` (text or chat), and what the reward needs: here a reference answer. Replace `reward_overlap` by your own
function: TRL calls it with the completions and every column of the rows. Every option of `GRPOConfig` is one of this script. Each
client samples from its quantized base, which takes most of the time. This script is the clients' side: if `model_name_or_path`
names the owner's full model, a separate owner process opens it, and samples from it to evaluate.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from fedlpp_hf import FederatedConfig, FederatedMixin, parse_args


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(
        metadata={"help": "The owner's full model, or a base made by `fedlpp-hf quantize`."}
    )
    train_data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file: the clients' rows."})
    eval_data: str = field(metadata={"help": "As train_data: the rows that every round is evaluated on."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, if it is on the Hub."})
    reference_column: str = field(default="reference", metadata={"help": "Column with the answer to come close to."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on this many rows, drawn at random."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Linear layers that get an adapter."}
    )


@dataclass
class FederatedGRPOConfig(GRPOConfig, FederatedConfig):
    """TRL's options and the federation's."""


class FederatedGRPOTrainer(FederatedMixin, GRPOTrainer):
    """TRL's trainer; its `train()` runs the federation."""


# The owner's process uses it, too: it travels there by value.
def reward_overlap(completions: list, reference: list[str], **columns) -> list[float]:
    """F1 of the words that an answer and its reference share, as in ROUGE-1: 0 for none, 1 for the same words."""
    rewards = []
    for completion, text in zip(completions, reference, strict=True):
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        said, wanted = Counter(answer.lower().split()), Counter(text.lower().split())
        rewards.append(2 * (said & wanted).total() / max(1, said.total() + wanted.total()))
    return rewards


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedGRPOConfig))

    def read(source: str, split: str, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            if arguments.reference_column != "reference":
                rows = rows.rename_column(arguments.reference_column, "reference")
            return rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))

    targets = arguments.target_modules
    trainer = FederatedGRPOTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=read(arguments.train_data, arguments.train_split),
        eval_dataset=read(arguments.eval_data, arguments.eval_split, arguments.max_eval_rows),
        reward_funcs=reward_overlap,
        processing_class=AutoTokenizer.from_pretrained(arguments.model_name_or_path),
        peft_config=LoraConfig(
            task_type=TaskType.CAUSAL_LM,
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
