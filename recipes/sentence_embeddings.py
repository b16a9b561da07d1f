# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of a model for sentence embeddings (sentence-transformers).

    pip install -c constraints.txt ".[sentences]"
    accelerate launch recipes/sentence_embeddings.py --config recipes/configs/sentence_embeddings.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. The evaluation looks for each anchor's
own positive among those of all rows: the share found first (accuracy@1), and the mean of 1/rank (MRR).

Rows are pairs of texts that belong together; the other pairs of a batch are the wrong answers (MultipleNegativesRankingLoss), so
that large batches teach more. This script is the clients' side: if `model_name_or_path` names the owner's full model, a
separate owner process opens it, and this one sees no weights but the quantized base. Any flag overrides the config.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

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
    anchor_column: str = field(default="anchor", metadata={"help": "Column with the text that looks for its pair."})
    positive_column: str = field(default="positive", metadata={"help": "Column with the text to find."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"], metadata={"help": "Linear layers that get an adapter."}
    )


@dataclass
class FederatedSentenceConfig(SentenceTransformerTrainingArguments, FederatedConfig):
    """The trainer's options and the federation's."""


class FederatedSentenceTrainer(FederatedMixin, SentenceTransformerTrainer):
    """The trainer; its `train()` runs the federation."""


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


def make_evaluator(rows: Dataset) -> InformationRetrievalEvaluator:
    """Finds each row's positive by its anchor, among the positives of all rows."""
    keys = [str(number) for number in range(len(rows))]
    return InformationRetrievalEvaluator(
        queries=dict(zip(keys, rows["anchor"], strict=True)),
        corpus=dict(zip(keys, rows["positive"], strict=True)),
        relevant_docs={key: {key} for key in keys},
        accuracy_at_k=[1],
        precision_recall_at_k=[1],
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[10],
        show_progress_bar=False,
        write_csv=False,
    )


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedSentenceConfig))
    group = args.dirichlet_column if args.partition == "dirichlet" else args.partition

    def read(source: str, split: str, keep: str = "", count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            rows = rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))
            rows = rows.rename_columns({arguments.anchor_column: "anchor", arguments.positive_column: "positive"})
            # The trainer takes every other column for one more text.
            return rows.select_columns(["anchor", "positive", *(name for name in rows.column_names if name == keep)])

    eval_rows = read(arguments.eval_data, arguments.eval_split, count=arguments.max_eval_rows)
    trainer = FederatedSentenceTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=read(arguments.train_data, arguments.train_split, keep=group),
        eval_dataset=eval_rows,
        selection_dataset=read(arguments.owner_data, arguments.owner_split) if arguments.owner_data else None,
        loss=MultipleNegativesRankingLoss,  # the class: each process calls it with its own model
        evaluator=make_evaluator(eval_rows),
        peft_config=LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            target_modules=arguments.target_modules,
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
