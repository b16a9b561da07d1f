# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of an encoder-decoder (T5, BART, …): summaries, translations, any text to text.

    pip install -c constraints.txt ".[demo]"
    accelerate launch recipes/seq2seq.py --config recipes/configs/seq2seq.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. Texts are generated for the
evaluation, and compared with the references by `metric`.

This script is the clients' side: if `model_name_or_path` names the owner's full model, a separate owner process opens it, and this
one sees no weights but the quantized base. Any flag overrides the config.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

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
    source_column: str = field(default="document", metadata={"help": "Column with the text to read."})
    target_column: str = field(default="summary", metadata={"help": "Column with the text to write."})
    prefix: str = field(default="", metadata={"help": "Text in front of each source, such as `summarize: ` for T5."})
    max_source_length: int = field(default=512, metadata={"help": "Tokens of a source; more are cut off."})
    max_target_length: int = field(default=64, metadata={"help": "Tokens of a target; more are cut off."})
    metric: str = field(
        default=str(Path(__file__).parent / "metrics" / "rouge_l.py"),
        metadata={"help": "Hub id or script of an `evaluate` metric on texts."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q", "v"], metadata={"help": "Linear layers that get an adapter."}
    )


@dataclass
class FederatedSeq2SeqConfig(Seq2SeqTrainingArguments, FederatedConfig):
    """The trainer's options and the federation's."""


class FederatedSeq2SeqTrainer(FederatedMixin, Seq2SeqTrainer):
    """The trainer; its `train()` runs the federation."""


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


# The owner's process uses it, too: it travels there by value.
def compute_metrics(prediction, tokenizer, metric: str) -> dict[str, float]:
    """The metric of the generated texts; -100 stands for padding in both."""
    texts = [
        tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
        for ids in (prediction.predictions, prediction.label_ids)
    ]
    return evaluate.load(metric).compute(predictions=texts[0], references=texts[1])


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedSeq2SeqConfig))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    group = args.dirichlet_column if args.partition == "dirichlet" else args.partition

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        sources = [arguments.prefix + text for text in batch[arguments.source_column]]
        targets = batch[arguments.target_column]
        encoded = tokenizer(sources, truncation=True, max_length=arguments.max_source_length)
        labels = tokenizer(text_target=targets, truncation=True, max_length=arguments.max_target_length)
        return {**encoded, "labels": labels["input_ids"]}

    def prepare(source: str, split: str, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            rows = rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))
            unused = [name for name in rows.column_names if name != group]
            return rows.map(tokenize, batched=True, remove_columns=unused, desc="Tokenizing")

    trainer = FederatedSeq2SeqTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=prepare(arguments.train_data, arguments.train_split),
        eval_dataset=prepare(arguments.eval_data, arguments.eval_split, arguments.max_eval_rows),
        selection_dataset=prepare(arguments.owner_data, arguments.owner_split) if arguments.owner_data else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=functools.partial(compute_metrics, tokenizer=tokenizer, metric=arguments.metric),
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.target_modules,
        ),
        model_class=AutoModelForSeq2SeqLM,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
