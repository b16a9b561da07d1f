# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of a causal language model whose full-precision weights stay with their owner.

    python recipes/owner_warmup.py --config recipes/configs/rnnlg_owner.yaml
    accelerate launch recipes/causal_lm.py --config recipes/configs/rnnlg.yaml

Hardware: two CPU cores for the 260 K parameters of that config; recipes/README.md has an example for a GPU. Expected: see
the head of the config. The metric is the loss per token of the completions (perplexity is its exponential).

This script is the clients' side. `model_name_or_path` may name the owner's full model: then a separate owner process
opens it, and this one sees no weights but the quantized base. Rows come from the Hub or from a file; with a
`prompt_column` the loss is on the completion alone; `chat` uses the model's chat template. Any flag overrides the config.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from fedlpp_hf import FederatedConfig, FederatedTrainer, parse_args


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(metadata={"help": "The owner's full model, or a base by `fedlpp-hf quantize`."})
    train_data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file: the clients' rows."})
    eval_data: str = field(metadata={"help": "As train_data: the rows that every round is evaluated on."})
    owner_data: str | None = field(default=None, metadata={"help": "The owner's rows, for `control_variate`."})
    selection_rows: int = field(default=0, metadata={"help": "This many owner's rows choose λ, and the round."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, if it is on the Hub."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on this many rows, drawn at random."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompt, if any."})
    completion_column: str = field(default="text", metadata={"help": "Column with the text to learn."})
    separator: str = field(default="\n", metadata={"help": "What stands between prompt and completion."})
    chat: bool = field(default=False, metadata={"help": "Put prompts into the chat template, as a user's messages."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a row; more are cut off."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Linear layers that get an adapter."}
    )


def read_rows(source: str, split: str, config: str | None) -> Dataset:
    suffix = Path(source).suffix.removeprefix(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        return load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train")
    return load_dataset(source, config, split=split)


def encode_rows(
    batch: dict[str, list], arguments: RecipeArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list]:
    """Token ids of prompts and their completions; -100 keeps the prompts out of the loss."""
    # The two are tokenized apart, so that no token reaches over the border.
    completions = tokenizer(batch[arguments.completion_column], add_special_tokens=False)["input_ids"]
    starts = [[tokenizer.bos_token_id] * bool(tokenizer.bos_token)] * len(completions)
    if arguments.prompt_column:
        prompts = batch[arguments.prompt_column]
        if arguments.chat:
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
            starts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        else:
            starts = tokenizer([prompt + arguments.separator for prompt in prompts])["input_ids"]
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for start, completion in zip(starts, completions, strict=True):
        ended = [*completion, tokenizer.eos_token_id]
        rows["input_ids"].append((start + ended)[: arguments.max_length])
        rows["labels"].append(([-100] * len(start) + ended)[: arguments.max_length])
    return rows


def tokenize_rows(rows: Dataset, arguments: RecipeArguments, tokenizer: PreTrainedTokenizerBase, keep: str) -> Dataset:
    """`input_ids` and `labels`, beside the column `keep` that says whose the row is."""
    rows = rows.map(
        encode_rows,
        batched=True,
        fn_kwargs={"arguments": arguments, "tokenizer": tokenizer},
        remove_columns=[name for name in rows.column_names if name != keep],
        desc="Tokenizing",
    )
    # A prompt that fills max_length leaves nothing to learn, and a loss over no token is NaN.
    kept = rows.filter(lambda row: any(label != -100 for label in row["labels"]), desc="Looking for completions")
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} rows were dropped: max_length={arguments.max_length} cuts off all of their completion."
        )
    return kept


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedConfig))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    group = args.dirichlet_column if args.partition == "dirichlet" else args.partition
    if group in ("label", "label_ids"):
        raise ValueError(f"Clients by the column `{group}`: Trainer takes it for the labels. Rename it in the data.")

    def prepare(source: str, split: str, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments.data_config)
            rows = rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))
            return tokenize_rows(rows, arguments, tokenizer, keep=group)

    if arguments.chat and not arguments.prompt_column:
        raise ValueError("chat=True without prompt_column, the user's messages. Set it.")
    if arguments.selection_rows and not arguments.owner_data:
        raise ValueError(
            f"selection_rows={arguments.selection_rows} without owner_data, which they are taken from. Set it."
        )
    owner: dict[str, Dataset | None] = {"train": None, "test": None}
    if arguments.owner_data:
        owner["train"] = prepare(arguments.owner_data, arguments.train_split)
        if arguments.selection_rows:
            owner = owner["train"].train_test_split(arguments.selection_rows, seed=0)

    targets = arguments.target_modules
    trainer = FederatedTrainer(
        model=arguments.model_name_or_path,
        args=args,
        train_dataset=prepare(arguments.train_data, arguments.train_split),
        eval_dataset=prepare(arguments.eval_data, arguments.eval_split, arguments.max_eval_rows),
        owner_dataset=owner["train"],
        selection_dataset=owner["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        peft_config=LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
        model_class=AutoModelForCausalLM,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
