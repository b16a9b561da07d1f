# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of a text classifier whose full-precision weights stay with their owner.

    python recipes/data/docstrings.py out/docstrings
    python recipes/owner_warmup.py --config recipes/configs/quickstart_owner.yaml
    accelerate launch recipes/sequence_classification.py --config recipes/configs/quickstart.yaml

Hardware: two CPU cores and 4 GB of memory are enough for the quickstart. Expected: see the head of its config.

This script is the clients' side. `model_name_or_path` may name the owner's full model: then a separate owner process
opens it, and this one sees no weights but the quantized base. The model must have a head for the task's labels already
(`owner_warmup.py` makes one). Rows come from the Hub or from a file; any flag overrides the config.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from fedlpp_hf import FederatedConfig, FederatedTrainer, parse_args


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(
        metadata={"help": "The owner's full model, or a base made by `fedlpp-hf quantize`."}
    )
    train_data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file: the clients' rows."})
    eval_data: str = field(metadata={"help": "As train_data: the rows that every round is evaluated on."})
    owner_data: str | None = field(
        default=None,
        metadata={"help": "As train_data: the owner's rows, for `control_variate`."},
    )
    selection_rows: int = field(
        default=0,
        metadata={"help": "Number of owner's rows that choose λ of `base_weights`, and the round to publish."},
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, if it is on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column with a second text, if any."})
    label_column: str = field(default="label", metadata={"help": "Column with the class: its index or its name."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; more are cut off."})
    metric: str = field(
        default=str(Path(__file__).parent / "metrics" / "classification.py"),
        metadata={"help": "Hub id or script of an `evaluate` metric on class indices."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"], metadata={"help": "Linear layers that get an adapter."}
    )


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


def tokenize_rows(
    rows: Dataset, arguments: RecipeArguments, tokenizer, label2id: dict[str, int], keep: str
) -> Dataset:
    """Token ids and `label`, the index of the class, beside the column `keep` that says whose the row is."""

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        pairs = batch[arguments.text_pair_column] if arguments.text_pair_column else None
        encoded = tokenizer(batch[arguments.text_column], pairs, truncation=True, max_length=arguments.max_length)
        labels = batch[arguments.label_column]
        encoded["label"] = [label2id[label] if isinstance(label, str) else label for label in labels]
        return encoded

    unused = [name for name in rows.column_names if name not in (keep, "label")]
    rows = rows.map(tokenize, batched=True, remove_columns=unused, desc="Tokenizing")
    if strange := set(rows["label"]) - set(label2id.values()):
        raise ValueError(
            f"The data have class {min(strange)}, but the model has a head for {len(label2id)} classes. Give the full "
            "model a head for this task first, as recipes/owner_warmup.py does."
        )
    return rows


# The owner's process uses it, too: it travels there by value.
def compute_metrics(prediction, metric: str) -> dict[str, float]:
    return evaluate.load(metric).compute(
        predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids
    )


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedConfig))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    label2id = AutoConfig.from_pretrained(arguments.model_name_or_path).label2id

    def prepare(source: str, split: str) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            return tokenize_rows(rows, arguments, tokenizer, label2id, keep=args.partition)

    if arguments.selection_rows and not arguments.owner_data:
        raise ValueError(
            f"selection_rows={arguments.selection_rows} without owner_data, which they are taken from. Set it."
        )
    owner: dict[str, Dataset | None] = {"train": None, "test": None}
    if arguments.owner_data:
        owner["train"] = prepare(arguments.owner_data, arguments.train_split)
        if arguments.selection_rows:
            owner = owner["train"].train_test_split(arguments.selection_rows, seed=0)

    trainer = FederatedTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=prepare(arguments.train_data, arguments.train_split),
        eval_dataset=prepare(arguments.eval_data, arguments.eval_split),
        owner_dataset=owner["train"],
        selection_dataset=owner["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=functools.partial(compute_metrics, metric=arguments.metric),
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS,  # the head is trained, too
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.target_modules,
        ),
        model_class=AutoModelForSequenceClassification,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
