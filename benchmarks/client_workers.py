# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Seconds of a round with the clients one after the other, and shared by worker processes: MiniLM, eight clients.

    python -m benchmarks.client_workers [--workers 2] [--rounds 4] [--steps 4]

The first round of each, in which processes start and memory is touched, is left out. The adapters at the end are compared:
with equal threads they are bit-identical, and with the usual ones (all cores in one process, one core for each worker)
whether they are is printed. One process of one thread is measured, too: what more threads gain in one process, workers can't gain
again.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from benchmarks.encoder import find_encoder
from fedlpp_hf import FederatedConfig, FederatedTrainer, export_base


CLIENTS, BATCH, LENGTH = 8, 8, 64


def run_federation(base: Path, output_dir: Path, workers: int, options: argparse.Namespace) -> tuple[float, dict]:
    """Median seconds of a round after the first, and the adapter at the end."""
    rounds, steps = options.rounds, options.steps
    torch.manual_seed(0)
    count = CLIENTS * BATCH * steps
    rows = {
        "input_ids": torch.randint(1000, 20000, (count, LENGTH)).tolist(),
        "attention_mask": [[1] * LENGTH] * count,
        "labels": [row % 2 for row in range(count)],
    }
    args = FederatedConfig(
        str(output_dir), num_rounds=rounds + 1, num_clients=CLIENTS, max_steps=steps, client_workers=workers,
        per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = FederatedTrainer(
        str(base),
        args,
        train_dataset=Dataset.from_dict(rows),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
        model_class=AutoModelForSequenceClassification,
    )
    trainer.train()
    seconds = [record["seconds"] for record in trainer.server.store.records()[2:]]
    return statistics.median(seconds), trainer.server.adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[max(os.cpu_count() or 1, 2)])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    encoder = find_encoder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_class = AutoModelForSequenceClassification
        export_base(encoder, folder / "base", model_class=model_class)
        alone, adapter = run_federation(folder / "base", folder / "1", 1, options)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        single, _ = run_federation(folder / "base", folder / "single", 1, options)
        torch.set_num_threads(threads)
        print(
            f"{CLIENTS} clients of {options.steps} steps one after the other: {alone:.2f} s a round with {threads} threads"
        )
        print(f"with 1 thread: {single:.2f} s; so {threads} threads are {single / alone:.2f} times as fast")
        for workers in options.workers:
            together, other = run_federation(folder / "base", folder / str(workers), workers, options)
            equal = all(torch.equal(adapter[key], other[key]) for key in adapter)
            print(
                f"{workers} workers: {together:.2f} s a round, {alone / together:.2f} times as fast ({single / together:.2f} times one "
                f"thread's); the adapters are "
                f"{'bit-identical' if equal else 'not bit-identical'} (threads differ)"
            )


if __name__ == "__main__":
    main()
