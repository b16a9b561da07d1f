# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What each rule of aggregation, server optimizer and compression ends at, on real text: metrics, and bytes of the files.

    python -m benchmarks.convergence --settings stories trec --seeds 0 1 2 --output convergence.jsonl

`stories`: a 260 K Llama, first tuned on dialogue acts of all domains, then federated over four domains (loss, lower is
better). `trec`: MiniLM with a new head, first tuned on 400 questions of six classes, then federated over four clients,
Dirichlet 0.3 (accuracy). A 4-bit base, and a 4-bit proxy in blocks of 64 where the variant has no other. Needs the shared
data folder beside the checkout. One line of JSON per run; runs that the output has already are not repeated. At the end the
tables of docs/aggregation.md.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.encoder import find_encoder
from fedlpp_hf import FederatedConfig, FederatedServer, FederatedTrainer
from fedlpp_hf.wire.encoding import restore_tensors


SHARED = Path(__file__).parents[1].parent / "shared"

# All local steps of a client in one round, from the untouched base.
ONCE = {"broadcast": "never", "num_rounds": 1}
SGD = {"optim": "sgd", "learning_rate": 0.3}
# What differs from plain FedAvg with a server step of 1.
VARIANTS: dict[str, dict] = {
    "fedavg": {},
    "freeze_a": {"aggregation": "freeze_a"},
    "exact": {"aggregation": "exact"},
    "fedavg, momentum 0.5": {"server_momentum": 0.5},
    "fedavg, yogi 0.01": {"server_optimizer": "yogi", "server_learning_rate": 0.01},
    "fedavg, fedprox 0.1": {"fedprox_mu": 0.1},
    "fedavg, 4 bits up": {"update_bits": 4},
    "fedavg, 5 % in 4 bits up": {"update_bits": 4, "update_density": 0.05},
    "exact, 4 bits up": {"aggregation": "exact", "update_bits": 4},
    "fedavg, local SGD": {**SGD},
    "fedavg, one round": {**ONCE},
    "exact, one round": {**ONCE, "aggregation": "exact"},
    # Bytes: of an adapter of millions of values, 2 bits are less than 1/12 of float32, and 3 bits less than 1/8.
    "float32 both ways": {"adapter_bits": 32},
    "2 bits down, 3 bits up": {"adapter_bits": 2, "update_bits": 3},
    "2 bits down, 3 bits up, blocks of 256": {"adapter_bits": 2, "update_bits": 3, "adapter_block_size": 256},
    "3 bits down, 3 bits up, blocks of 256": {"adapter_bits": 3, "update_bits": 3, "adapter_block_size": 256},
}


def read_rows(path: str, count: int | None = None) -> Dataset:
    rows = load_dataset("json", data_files=str(SHARED / "data" / path), split="train")
    return rows if count is None else rows.shuffle(seed=0).take(count)


def prepare_stories(scratch: Path) -> dict:
    """The full model, warmed up once, and what a trainer of it needs."""
    source = SHARED / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(row):
        start = tokenizer(row["act"] + "\n")["input_ids"]
        end = [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": (start + end)[:96], "labels": ([-100] * len(start) + end)[:96]}

    def tokenize(rows):
        unused = [name for name in rows.column_names if name != "domain"]
        return rows.map(encode, remove_columns=unused).filter(
            lambda row: any(label != -100 for label in row["labels"])
        )

    model, collator = AutoModelForCausalLM.from_pretrained(source), DataCollatorForSeq2Seq(tokenizer)
    train(model, tokenize(read_rows("rnnlg/validation.jsonl")), collator, scratch, 150, 3e-3)
    return {
        "model": scratch / "full",
        "train_dataset": tokenize(read_rows("rnnlg/train.jsonl")),
        "eval_dataset": tokenize(read_rows("rnnlg/test.jsonl", 300)),
        "data_collator": collator,
        "model_class": AutoModelForCausalLM,
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        "options": {"partition": "domain", "num_rounds": 6, "max_steps": 8, "learning_rate": 2e-3},
        "metric": "eval_loss",
    }


def prepare_trec(scratch: Path) -> dict:
    source = find_encoder()
    tokenizer = AutoTokenizer.from_pretrained(source)

    def tokenize(rows):
        return rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=48), batched=True
        ).remove_columns("text")

    set_seed(0)
    model, collator = (
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=6),
        DataCollatorWithPadding(tokenizer),
    )
    rows = tokenize(read_rows("trec/train.jsonl").shuffle(seed=0))
    # A new head on skewed clients says one class for longer than these runs last.
    train(model, rows.take(400), collator, scratch, 50, 2e-4)
    return {
        "model": scratch / "full",
        "train_dataset": rows.skip(400),
        "eval_dataset": tokenize(read_rows("trec/test.jsonl")),
        "data_collator": collator,
        "compute_metrics": compute_accuracy,
        "model_class": AutoModelForSequenceClassification,
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"),
        "options": {
            "partition": "dirichlet",
            "dirichlet_alpha": 0.3,
            "num_clients": 4,
            "num_rounds": 6,
            "max_steps": 5,
            "learning_rate": 1e-3,
        },
        "metric": "eval_accuracy",
    }


SETTINGS = {"stories": prepare_stories, "trec": prepare_trec}


def compute_accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(model, rows: Dataset, collator, scratch: Path, steps: int, learning_rate: float) -> None:
    args = TrainingArguments(
        str(scratch / "warmup"),
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, args, collator, rows).train()
    model.save_pretrained(scratch / "full")


def run_seed(setting: dict, seed: int, variants: list[str], scratch: Path):
    """Yields a record per variant: one trainer and one owner for all, and one server for each."""
    common = {
        "use_cpu": True,
        "seed": seed,
        "report_to": [],
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "adapter_block_size": 64,
        "overwrite": True,
        "merge": False,
        **setting["options"],
    }
    changes = {variant: dict(VARIANTS[variant]) for variant in variants}
    for change in changes.values():
        if change.get("num_rounds") == 1:
            change["max_steps"] = common["num_rounds"] * common["max_steps"]
    # Before the trainer is made: every TrainingArguments resets accelerate's state, which a trainer lives on.
    configs = {
        variant: FederatedConfig(str(scratch / "server"), **{**common, **change})
        for variant, change in changes.items()
    }
    names = ("train_dataset", "eval_dataset", "data_collator", "compute_metrics", "model_class", "peft_config")
    trainer = FederatedTrainer(
        str(setting["model"]),
        FederatedConfig(str(scratch / "trainer"), **common),
        **{name: setting[name] for name in names if name in setting},
    )
    start = dict(trainer.guard.initial)
    start |= {key: value for key, value in trainer.owner.initial_adapter().items() if "lora_" not in key}
    for variant, args in configs.items():
        server = FederatedServer(
            args,
            start,
            trainer.model.peft_config["default"],
            {client: len(rows) for client, rows in trainer.client_datasets.items()},
            trainer.guard.fingerprint,
        )
        # The trainer's own arguments are those of the local runs.
        with patch.multiple(trainer.args, seed=seed, **changes[variant]):
            records = server.run(lambda tasks: (trainer.train_client(task) for task in tasks))
        proxy = restore_tensors(server.make_proxy(server.adapter))
        yield {
            "variant": variant,
            "seed": seed,
            "server": trainer.owner.evaluate(server.adapter, server.state.residual)[setting["metric"]],
            "proxy": trainer.evaluate_proxy(proxy)[setting["metric"]],
            "megabytes_down": sum(record["bytes_down"] for record in records) / 1e6,
            "megabytes_up": sum(record["bytes_up"] for record in records) / 1e6,
            "residual_share": records[-1].get("residual_norm", 0.0) / records[-1].get("product_norm", 1.0),
        }
    trainer.owner.close()


def print_table(runs: list[dict], reference: str) -> None:
    """A table per setting: mean and standard deviation over the seeds, and each seed's difference to `reference`."""
    for setting in dict.fromkeys(run["setting"] for run in runs):
        print(
            f"\n{setting}\n\n| variant | server | difference | proxy | difference | MB down | MB up |\n|---|---|---|---|---|---|---|"
        )
        by_seed = {(run["variant"], run["seed"]): run for run in runs if run["setting"] == setting}
        for variant in VARIANTS:
            found = [run for (name, _), run in sorted(by_seed.items()) if name == variant]
            if not found:
                continue
            cells = []
            for name in ("server", "proxy"):
                values = [run[name] for run in found]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                pairs = [(run[name], by_seed.get((reference, run["seed"]))) for run in found]
                differences = [f"{value - plain[name]:+.3f}" for value, plain in pairs if plain]
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
                cells.append("" if variant == reference else " ".join(differences).replace("-", "−"))
            cells += [
                f"{statistics.mean(run[name] for run in found):.2f}" for name in ("megabytes_down", "megabytes_up")
            ]
            print(f"| {variant} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--reference", default="fedavg", choices=VARIANTS, help="what the table's differences are to")
    parser.add_argument("--output", type=Path, default=Path("convergence.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    for name in args.settings:
        with tempfile.TemporaryDirectory() as scratch:
            setting = None
            for seed in args.seeds:
                done = {run["variant"] for run in runs if (run["setting"], run["seed"]) == (name, seed)}
                left = [variant for variant in args.variants if variant not in done]
                if not left:
                    continue
                setting = setting or SETTINGS[name](Path(scratch))
                for record in run_seed(setting, seed, left, Path(scratch)):
                    runs.append({"setting": name, **record})
                    with args.output.open("a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
                    print(json.dumps(runs[-1]), flush=True)
    print_table(runs, args.reference)


if __name__ == "__main__":
    main()
