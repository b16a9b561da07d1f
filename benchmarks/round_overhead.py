# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client's round costs over a bare PyTorch loop of the same steps on the same batches, to the same bits, and what a
plain Trainer costs that is made anew for each client, as a loop of one's own would do it.

    python -m benchmarks.round_overhead [--repeats 15] [--steps 1 20]

The model is the 22 M encoder of the quickstart as a 4-bit base with LoRA on all linear layers, batches of 8 rows of 64
tokens. The loop builds its optimizer and schedule, collates, trains, clips and steps; the round does that through the
Trainer, and also loads the proxy, takes Δ, and checks the base. All alternate; medians and ratios to the loop are printed.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_scheduler,
    set_seed,
)

from benchmarks.encoder import find_encoder
from fedlpp_hf import FederatedConfig, FederatedTrainer, export_base, load_base
from fedlpp_hf.tensors.adapters import copy_adapter, load_adapter_
from fedlpp_hf.wire.messages import ClientTask


BATCH, LENGTH = 8, 64


def make_trainer(folder: Path, steps: int) -> FederatedTrainer:
    encoder = find_encoder()
    if not (folder / "base").exists():
        export_base(encoder, folder / "base", model_class=AutoModelForSequenceClassification)
    torch.manual_seed(0)
    rows = {
        "input_ids": torch.randint(1000, 20000, (BATCH * steps, LENGTH)).tolist(),
        "attention_mask": [[1] * LENGTH] * (BATCH * steps),
        "labels": [row % 2 for row in range(BATCH * steps)],
    }
    args = FederatedConfig(
        str(folder / f"out-{steps}"), per_device_train_batch_size=BATCH, num_clients=1, use_cpu=True, disable_tqdm=True
    )
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    model = load_base(folder / "base", AutoModelForSequenceClassification)
    return FederatedTrainer(model, args, train_dataset={"client": Dataset.from_dict(rows)}, peft_config=lora)


def run_bare_loop(trainer: FederatedTrainer, task: ClientTask, steps: int) -> None:
    model, parameters = trainer.model, list(trainer.guard.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=trainer.args.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_scheduler("linear", optimizer, 0, steps)
    set_seed(task.seed)
    order = torch.randperm(BATCH * steps, generator=torch.Generator().manual_seed(task.seed)).tolist()
    rows = trainer.client_datasets["client"]
    model.train()
    for batch in DataLoader(rows, BATCH, sampler=order, collate_fn=default_data_collator):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def run_plain_trainer(trainer: FederatedTrainer, task: ClientTask, folder: Path) -> None:
    args = TrainingArguments(
        str(folder / "plain"), per_device_train_batch_size=BATCH, num_train_epochs=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, seed=task.seed,
    )  # fmt: skip
    plain = Trainer(trainer.model, args, train_dataset=trainer.client_datasets["client"])
    plain.remove_callback(PrinterCallback)
    plain.train()


def measure(folder: Path, steps: int, repeats: int) -> dict[str, float]:
    trainer = make_trainer(folder, steps)
    start = copy_adapter(trainer.guard.parameters)
    task = ClientTask("benchmark", 1, 1, "client", 7, trainer.guard.fingerprint, start)
    gc.collect()
    gc.freeze()  # as `train()` does for the whole federation
    times: dict[str, list[float]] = {"round": [], "loop": [], "plain": []}
    ends = {}
    for repeat in range(repeats + 2):
        for name in times:
            load_adapter_(trainer.guard.parameters, start)
            if name == "plain":
                gc.unfreeze()  # nobody freezes in a loop of one's own
            began = time.perf_counter()
            if name == "round":
                trainer.train_client(task)
            elif name == "loop":
                run_bare_loop(trainer, task, steps)
            else:
                run_plain_trainer(trainer, task, folder)
            if repeat >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - began)
            if name == "plain":
                gc.collect()
                gc.freeze()
            ends[name] = copy_adapter(trainer.guard.parameters)
    gc.unfreeze()
    if not all(torch.equal(ends["round"][key], ends["loop"][key]) for key in start):
        raise SystemExit("The round and the loop ended in different bits, so their times can't be compared.")
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = sorted(a / b for a, b in zip(times["round"], times["loop"], strict=True))
    plain = statistics.median(a / b for a, b in zip(times["plain"], times["loop"], strict=True))
    return {
        "steps": steps,
        "round_ms": 1000 * medians["round"],
        "loop_ms": 1000 * medians["loop"],
        "ratio": statistics.median(ratios),
        "plain_trainer_ratio": plain,
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print results as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for steps in options.steps:
            result = measure(Path(folder), steps, max(3, options.repeats // (1 if steps == 1 else 3)))
            if options.json:
                print(json.dumps(result))
            else:
                low, high = result["ratio_quartiles"]
                print(
                    f"{steps:3d} steps: round {result['round_ms']:.0f} ms, bare loop {result['loop_ms']:.0f} ms, "
                    f"ratio {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}), equal bits; "
                    f"a new plain Trainer {result['plain_trainer_ratio']:.2f}"
                )


if __name__ == "__main__":
    main()
