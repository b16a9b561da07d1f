# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of a token classifier: names, addresses, code, anything that is marked word by word.

    pip install -c constraints.txt ".[demo]"
    accelerate launch recipes/token_classification.py --config recipes/configs/token_classification.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. The metrics are the F1, precision
and recall of whole entities, and the accuracy per word.

Rows hold words and a tag for each (`B-PER`, `I-PER`, `O`). A model without a head gets a new one. This script is the clients' side: if
`model_name_or_path` names the owner's full model, a separate owner process opens it, and this one sees no weights but the
quantized base. Any flag overrides the config.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

from fedlpp_hf import FederatedConfig, FederatedTrainer, parse_args


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
    tokens_column: str = field(default="tokens", metadata={"help": "Column with the list of words."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column with the tag of each word: index or name."})
    tag_names: list[str] | None = field(
        default=None,
        metadata={"help": "The tags in order; by default those that the data name. Tags as text need it."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; more are cut off."})
    metric: str = field(
        default=str(Path(__file__).parent / "metrics" / "entities.py"),
        metadata={"help": "Hub id or script of an `evaluate` metric on lists of tags."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"], metadata={"help": "Linear layers that get an adapter."}
    )


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


def tokenize_rows(rows: Dataset, arguments: RecipeArguments, tokenizer, names: list[str], keep: str) -> Dataset:
    """Token ids and `labels`: the tag of a word at its first token, and -100, which the loss skips, at the others."""

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch[arguments.tokens_column], is_split_into_words=True, truncation=True, max_length=arguments.max_length
        )
        labels = []
        for row, tags in enumerate(batch[arguments.tags_column]):
            ids = [names.index(tag) if isinstance(tag, str) else tag for tag in tags]
            words = encoded.word_ids(row)
            firsts = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            labels.append([ids[word] if first else -100 for word, first in zip(words, firsts, strict=True)])
        return {**encoded, "labels": labels}

    unused = [name for name in rows.column_names if name != keep]
    return rows.map(tokenize, batched=True, remove_columns=unused, desc="Tokenizing")


# The owner's process uses it, too: it travels there by value.
def compute_metrics(prediction, names: list[str], metric: str) -> dict[str, float]:
    texts = zip(prediction.predictions.argmax(axis=-1), prediction.label_ids, strict=True)
    pairs = [[(names[said], names[true]) for said, true in zip(*text, strict=True) if true != -100] for text in texts]
    return evaluate.load(metric).compute(
        predictions=[[said for said, _ in row] for row in pairs],
        references=[[true for _, true in row] for row in pairs],
    )


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedConfig))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    train_rows = read_rows(arguments.train_data, arguments.train_split, arguments.data_config)
    feature = getattr(train_rows.features[arguments.tags_column], "feature", None)
    names = arguments.tag_names or getattr(feature, "names", None)
    if not names:
        raise ValueError(
            f"The data do not name the tags of `{arguments.tags_column}`. List them: --tag_names O B-PER I-PER."
        )

    def prepare(rows: Dataset, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))
            return tokenize_rows(rows, arguments, tokenizer, names, keep=args.partition)

    def read(source: str, split: str) -> Dataset:
        return read_rows(source, split, arguments.data_config)

    trainer = FederatedTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=prepare(train_rows),
        eval_dataset=prepare(read(arguments.eval_data, arguments.eval_split), arguments.max_eval_rows),
        selection_dataset=prepare(read(arguments.owner_data, arguments.owner_split)) if arguments.owner_data else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=functools.partial(compute_metrics, names=names, metric=arguments.metric),
        peft_config=LoraConfig(
            task_type=TaskType.TOKEN_CLS,  # the head is trained, too
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.target_modules,
        ),
        model_class=AutoModelForTokenClassification,
        model_init_kwargs={"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}},
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
