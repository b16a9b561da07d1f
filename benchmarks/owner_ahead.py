# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Seconds of a round when the owner estimates the control variate after the clients, and beside them: MiniLM, four clients.

    OMP_NUM_THREADS=1 python -m benchmarks.owner_ahead [--rounds 4] [--steps 4]

One thread for each process, so that two cores are enough. The first round of each, in which memory is touched, is left out. Both
end in the same bits.
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
from fedlpp_hf import FederatedConfig, FederatedTrainer


CLIENTS, BATCH, LENGTH = 4, 8, 64


def run_federation(output_dir: Path, ahead: bool, options: argparse.Namespace) -> tuple[float, float, dict]:
    """Median seconds of a round after the first, those of them that waited for the owner, and the adapter at the end."""
    torch.manual_seed(0)
    count = (CLIENTS + 1) * BATCH * options.steps
    rows = Dataset.from_dict(
        {
            "input_ids": torch.randint(1000, 20000, (count, LENGTH)).tolist(),
            "attention_mask": [[1] * LENGTH] * count,
            "labels": [row % 2 for row in range(count)],
        }
    )
    own = BATCH * options.steps
    args = FederatedConfig(
        str(output_dir), num_rounds=options.rounds + 1, num_clients=CLIENTS, max_steps=options.steps, merge=False,
        per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True, disable_tqdm=True, report_to=[],
        control_variate=1.0,
    )  # fmt: skip
    trainer = FederatedTrainer(
        find_encoder(),
        args,
        train_dataset=rows.select(range(own, count)),
        eval_dataset=rows.select(range(BATCH)),
        owner_dataset=rows.select(range(own)),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"),
        model_class=AutoModelForSequenceClassification,
    )
    if not ahead:
        trainer.share_cores = lambda: setattr(trainer.owner, "works_ahead", False)
    trainer.train()
    records = trainer.server.store.records()[2:]
    seconds = [statistics.median(record[name] for record in records) for name in ("seconds", "owner_seconds")]
    trainer.owner.close()
    return seconds[0], seconds[1], trainer.server.adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the owner's process
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        after, waited, adapter = run_federation(Path(name, "after"), False, options)
        beside, still, other = run_federation(Path(name, "beside"), True, options)
    equal = all(torch.equal(adapter[key], other[key]) for key in adapter)
    print(f"variate after the clients   {after:.2f} s a round, of which {waited:.2f} s wait for the owner")
    print(f"variate beside them         {beside:.2f} s a round, of which {still:.2f} s wait for the owner")
    print(f"ratio {after / beside:.2f}; the adapters are {'bit-identical' if equal else 'not bit-identical'}")


if __name__ == "__main__":
    main()
