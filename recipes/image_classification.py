# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of an image classifier.

    pip install -c constraints.txt ".[demo]"
    accelerate launch recipes/image_classification.py --config recipes/configs/image_classification.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. The metrics are accuracy and macro F1.

Images come from the Hub, or from a folder with one subfolder for each split and class (`train/cat/1.png`). They are resized and
normalized when a batch is made: made before, they would take many times their space on disk. A model without a head gets a new
one. This script is the clients' side: if `model_name_or_path` names the owner's full model, a separate owner process opens it,
and this one sees no weights but the quantized base. Any flag overrides the config.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fedlpp_hf import FederatedConfig, FederatedTrainer, parse_args


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(
        metadata={"help": "The owner's full model, or a base made by `fedlpp-hf quantize`."}
    )
    train_data: str = field(metadata={"help": "Hub id, folder of images, or .parquet file: the clients' rows."})
    eval_data: str = field(metadata={"help": "As train_data: the rows that every round is evaluated on."})
    owner_data: str | None = field(
        default=None, metadata={"help": "As train_data: the owner's rows, which choose λ and the round to publish."}
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, if it is on the Hub."})
    owner_split: str = field(default="train", metadata={"help": "Split of owner_data, if it is on the Hub."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on this many rows, drawn at random."})
    image_column: str = field(default="image", metadata={"help": "Column with the image."})
    label_column: str = field(default="label", metadata={"help": "Column with the index of the class."})
    metric: str = field(
        default=str(Path(__file__).parent / "metrics" / "classification.py"),
        metadata={"help": "Hub id or script of an `evaluate` metric on class indices."},
    )
    head: list[str] = field(
        default_factory=lambda: ["classifier"], metadata={"help": "Layers to train in full: the head, new or not."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers that get an adapter."}
    )


# The owner's process uses both, too: they travel there by value.
@dataclass
class ImageCollator:
    """`pixel_values` `(batch, channels, height, width)` and `labels` of rows with an image."""

    processor: Any
    image_column: str
    label_column: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row[self.image_column].convert("RGB") for row in rows]
        labels = torch.tensor([row[self.label_column] for row in rows])
        return {**self.processor(images, return_tensors="pt"), "labels": labels}


def compute_metrics(prediction, metric: str) -> dict[str, float]:
    return evaluate.load(metric).compute(
        predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids
    )


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    if source.endswith(".parquet"):
        return load_dataset("parquet", data_files=source, split="train")
    return load_dataset(source, config, split=split)


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedConfig))
    args.remove_unused_columns = False  # the model does not take images; the collator does
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)

    def read(source: str, split: str, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            return rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))

    train_rows = read(arguments.train_data, arguments.train_split)
    names = getattr(train_rows.features[arguments.label_column], "names", None)
    if names is None:
        raise ValueError(f"The data do not name the classes of `{arguments.label_column}`: expected a ClassLabel.")
    trainer = FederatedTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=train_rows,
        eval_dataset=read(arguments.eval_data, arguments.eval_split, arguments.max_eval_rows),
        selection_dataset=read(arguments.owner_data, arguments.owner_split) if arguments.owner_data else None,
        processing_class=processor,
        data_collator=ImageCollator(processor, arguments.image_column, arguments.label_column),
        compute_metrics=functools.partial(compute_metrics, metric=arguments.metric),
        peft_config=LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.target_modules,
            modules_to_save=arguments.head,
        ),
        model_class=AutoModelForImageClassification,
        model_init_kwargs={"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}},
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
