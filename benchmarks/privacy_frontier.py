# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Server quality against stolen value: stories260K × rnnlg, for what is broadcast and at how many bits.

    python -m benchmarks.privacy_frontier --quick                    one seed, two settings
    python -m benchmarks.privacy_frontier --seeds 0 1 2 --settings fedlpp rare never

It needs the shared data folder beside the checkout, and makes the owner's model itself: all weights of stories260K, 150
steps on rnnlg's validation split. All settings have the same number of local steps. One line per setting and seed goes
to the CSV file; losses are in nats per token, means over the evaluation rows, which are drawn from the test split.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

from datasets import concatenate_datasets
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from fedlpp_hf import AuditReport, FederatedConfig, FederatedTrainer
from recipes.causal_lm import RecipeArguments, read_rows, tokenize_rows


SHARED = Path(__file__).parents[1].parent / "shared"
RNNLG = SHARED / "data" / "rnnlg"
# The budget of steps is split over the rounds; where nothing is broadcast, one long round serves.
SETTINGS = {
    "full precision": {"num_rounds": 5, "base_bits": 32, "adapter_bits": 32},
    "fedlpp": {"num_rounds": 5, "adapter_bits": 4},
    "coarse adapter": {"num_rounds": 5, "adapter_bits": 2},
    "rare": {"num_rounds": 5, "adapter_bits": 4, "broadcast": "3"},
    "never": {"num_rounds": 1, "broadcast": "never", "fit_server_step": True},
    "never, 3 bits": {"num_rounds": 1, "broadcast": "never", "fit_server_step": True, "base_bits": 3},
}
QUICK = ("fedlpp", "never")


def warm_up(directory: Path) -> Path:
    """The owner's model, made once."""
    if not (directory / "config.json").is_file():
        command = [
            sys.executable,
            "recipes/owner_warmup.py",
            "--config",
            "recipes/configs/rnnlg_owner.yaml",
            "--max_steps",
            "150",
        ]
        subprocess.run([*command, "--output_dir", str(directory)], check=True)
    return directory


def read_split(split: str, tokenizer, count: int, domains: tuple[str, ...] = ()):
    """`count` rows of a split, drawn by a fixed seed; of each of `domains`, if they are given."""
    arguments = RecipeArguments("", "", "", prompt_column="act", max_length=160)
    rows = read_rows(str(RNNLG / f"{split}.jsonl"), split, None).shuffle(seed=0)
    parts = [rows.filter(lambda row, name=name: row["domain"] == name) for name in domains] or [rows]
    chosen = concatenate_datasets([part.take(min(count, len(part))) for part in parts])
    return tokenize_rows(chosen, arguments, tokenizer, "domain")


def run_setting(name: str, seed: int, owner: Path, data: dict, arguments: argparse.Namespace) -> dict:
    """One federation with its audit, as a line of the table."""
    began = time.perf_counter()
    setting = {"base_bits": 4, **SETTINGS[name]}
    output_dir = arguments.output_dir / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    args = FederatedConfig(
        str(output_dir),
        **setting,
        seed=seed,
        partition="domain",
        max_steps=arguments.steps // setting["num_rounds"],
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        adapter_block_size=64,
        audit=True,
        audit_rows=arguments.rows,
        audit_steps=arguments.steps,
        audit_clients=arguments.audit_clients,
        merge=False,
        overwrite=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = data["tokenizer"]
    trainer = FederatedTrainer(
        str(owner),
        args,
        DataCollatorForSeq2Seq(tokenizer),
        data["train"],
        data["eval"],
        owner_dataset=data["owner"],
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules="all-linear"),
        model_class=AutoModelForCausalLM,
    )
    trainer.train()
    trainer.owner.close()
    report = AuditReport.read(output_dir)
    line = {"setting": name, "seed": seed, "owner before": report.before["loss"], "server": report.server["loss"]}
    for label, coalition in (("client", report.worst_single), ("half", report.worst_half)):
        if coalition is not None:
            stolen = coalition.stolen["loss"]
            line |= {f"{label}: best attacker": stolen.attacker, f"{label}: local only": stolen.local_only}
            line |= {f"{label}: stolen": stolen.value, f"{label}: low": stolen.low, f"{label}: high": stolen.high}
    return line | {"exposure": report.exposure.value, "audit s": report.seconds, "s": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one seed, few steps, {' and '.join(QUICK)}")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=256, help="evaluation rows")
    parser.add_argument(
        "--steps", type=int, default=100, help="of a client in all rounds together, and of an attacker"
    )
    parser.add_argument("--audit_clients", type=int, default=1, help="clients that attack alone")
    parser.add_argument("--output_dir", type=Path, default=Path("out/privacy_frontier"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.settings, arguments.seeds = list(QUICK), [0]
        arguments.steps, arguments.learning_rate, arguments.batch_size = 20, 2e-3, 8
    if not RNNLG.is_dir():
        raise SystemExit(f"There is no {RNNLG}: this benchmark needs the shared data folder beside the checkout.")

    owner = warm_up(arguments.output_dir / "owner")
    tokenizer = AutoTokenizer.from_pretrained(owner)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = {
        "tokenizer": tokenizer,
        "train": read_split("train", tokenizer, 1600, ("restaurant", "hotel", "laptop", "tv")),
        "eval": read_split("test", tokenizer, arguments.rows),
        "owner": read_split("validation", tokenizer, 200),
    }
    lines = []
    for seed in arguments.seeds:
        for name in arguments.settings:
            lines.append(run_setting(name, seed, owner, data, arguments))
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in lines[-1].items()))
            with open(arguments.output_dir / "frontier.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, max(lines, key=len))
                writer.writeheader()
                writer.writerows(lines)


if __name__ == "__main__":
    main()
