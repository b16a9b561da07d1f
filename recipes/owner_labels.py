# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rows for an owner that has no labels: its own texts or prompts, labelled by its own model.

    python recipes/owner_labels.py --task causal_lm --model_name_or_path out/rnnlg_owner --data prompts.jsonl \\
        --prompt_column act --completion_column text --output_file out/own.jsonl

Hardware: two CPU cores; a minute for 400 short prompts to a small model. Expected: the rows of `data` with the model's
answers, completions drawn from it or its likeliest class, ready to be the federation's `owner_data` for the control
variate. docs/threat-model.md has what such rows are worth there, against rows with true labels.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from fedlpp_hf import parse_args


@dataclass
class LabelArguments:
    task: str = field(metadata={"help": "sequence_classification or causal_lm."})
    model_name_or_path: str = field(metadata={"help": "Hub id or path of the owner's full model."})
    data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file with texts or prompts."})
    output_file: str = field(metadata={"help": "JSONL file to write."})
    split: str = field(default="train", metadata={"help": "Split of data, if it is on the Hub."})
    max_rows: int | None = field(default=None, metadata={"help": "Use so many rows, drawn by the seed."})
    text_column: str = field(default="text", metadata={"help": "Column with the text to classify."})
    label_column: str = field(default="label", metadata={"help": "Column that gets the index of the class."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt of a causal LM."})
    completion_column: str = field(default="text", metadata={"help": "Column that gets the completion."})
    separator: str = field(default="\n", metadata={"help": "What stands between prompt and completion."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a row; more are cut off."})
    batch_size: int = field(default=32, metadata={"help": "Rows at a time."})
    temperature: float = field(default=1.0, metadata={"help": "Of the draws; 1 draws from the model itself."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})


def read_rows(arguments: LabelArguments) -> Dataset:
    suffix = Path(arguments.data).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        rows = load_dataset(suffix.replace("jsonl", "json"), data_files=arguments.data, split="train")
    else:
        rows = load_dataset(arguments.data, split=arguments.split)
    if arguments.max_rows is not None:
        rows = rows.shuffle(seed=arguments.seed).take(min(arguments.max_rows, len(rows)))
    return rows


@torch.no_grad()
def classify(rows: Dataset, arguments: LabelArguments) -> list[int]:
    """The likeliest class of each text."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model_name_or_path).eval()
    found: list[int] = []
    for batch in rows.iter(arguments.batch_size):
        texts = tokenizer(
            batch[arguments.text_column], truncation=True, max_length=arguments.max_length, padding=True, return_tensors="pt"
        )  # fmt: skip
        found += model(**texts).logits.argmax(-1).tolist()
    return found


@torch.no_grad()
def complete(rows: Dataset, arguments: LabelArguments) -> list[str]:
    """A completion of each prompt, drawn from the model."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path).eval()
    found: list[str] = []
    for batch in rows.iter(arguments.batch_size):
        prompts = [prompt + arguments.separator for prompt in batch[arguments.prompt_column]]
        inputs = tokenizer(
            prompts, truncation=True, max_length=arguments.max_length - 1, padding=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        outputs = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=max(arguments.max_length, length + 1),
            do_sample=True, temperature=arguments.temperature, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        found += tokenizer.batch_decode(outputs[:, length:], skip_special_tokens=True)
    return found


def main() -> None:
    (arguments,) = parse_args((LabelArguments,))
    set_seed(arguments.seed)
    rows = read_rows(arguments)
    if arguments.task == "sequence_classification":
        column, answers = arguments.label_column, classify(rows, arguments)
    elif arguments.task == "causal_lm":
        column, answers = arguments.completion_column, complete(rows, arguments)
    else:
        raise ValueError(f"task={arguments.task!r}; expected sequence_classification or causal_lm.")
    output = Path(arguments.output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            file.write(json.dumps({**row, column: answer}) + "\n")
    print(f"{len(answers)} rows with the model's own answers in `{output}`.")


if __name__ == "__main__":
    main()
