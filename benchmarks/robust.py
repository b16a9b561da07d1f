# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Robust rules against as many attackers as they withstand, on real text: the server's accuracy.

    python -m benchmarks.robust --seed 0 --output robust.jsonl

MiniLM on questions of six classes (the setting `trec` of benchmarks.convergence), nine clients with equal shares (iid), five
rounds of five steps, 4-bit base and proxy. Attackers know what the honest clients answer. Needs the shared data folder
beside the checkout. One line of JSON per run; runs that the output has already are not repeated.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.convergence import prepare_trec
from fedlpp_hf import FederatedConfig, FederatedServer, FederatedTrainer
from fedlpp_hf.wire.encoding import restore_tensors
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate


CLIENTS = 9
Delta = dict[str, torch.Tensor]

# The rule, and the attackers it faces: as many as it withstands.
RULES = [
    ("none", 2),
    ("none", 4),
    ("median", 4),
    ("trimmed_mean", 4),
    ("multi_krum", 3),
]
OPTIONS = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "adapter_block_size": 64,
    "weighting": "uniform",
    "partition": "iid",
    "num_clients": CLIENTS,
    "min_clients": CLIENTS,
    "num_rounds": 5,
    "max_steps": 5,
    "overwrite": True,
    "merge": False,
}


def flip(stacks: Delta) -> Delta:
    """Ten times the honest mean, backwards."""
    return {key: -10 * stack.mean(0) for key, stack in stacks.items()}


def hide(stacks: Delta) -> Delta:
    """A little is enough (arXiv 1902.06156): one standard deviation off in every coordinate."""
    return {key: stack.mean(0) - stack.std(0) for key, stack in stacks.items()}


ATTACKS: dict[str, Callable[[Delta], Delta]] = {"flip × 10": flip, "a little": hide}


def train_round(
    trainer: FederatedTrainer, tasks: list[ClientTask], attack: Callable[[Delta], Delta], attackers: int
) -> list[ClientUpdate]:
    """The answers to a round's tasks; those of the first `attackers` clients are made of the others'."""
    honest = [trainer.train_client(task) for task in tasks[attackers:]]
    if not attackers:
        return honest
    deltas = [restore_tensors(update.delta) for update in honest]
    delta = attack({key: torch.stack([each[key] for each in deltas]) for key in deltas[0]})
    bad = dataclasses.replace(honest[0], num_examples=1, delta=delta)
    return [dataclasses.replace(bad, client_id=task.client_id) for task in tasks[:attackers]] + honest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("robust.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [("no attack", "none", 0)] + [(attack, *rule) for attack in ATTACKS for rule in RULES]
    runs = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {(run["attack"], run["robust"], run["attackers"]) for run in runs if run["seed"] == args.seed}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        setting = prepare_trec(scratch)
        # Before the trainer is made: every TrainingArguments resets accelerate's state, which a trainer lives on.
        configs = {
            (attack, robust, attackers): FederatedConfig(
                str(scratch / "server"), seed=args.seed, robust=robust, num_attackers=attackers, **OPTIONS
            )
            for attack, robust, attackers in wanted
        }
        names = ("train_dataset", "eval_dataset", "data_collator", "compute_metrics", "model_class", "peft_config")
        trainer = FederatedTrainer(
            str(setting["model"]),
            FederatedConfig(str(scratch / "trainer"), seed=args.seed, **OPTIONS),
            **{key: setting[key] for key in names},
        )
        start = dict(trainer.guard.initial)
        start |= {key: value for key, value in trainer.owner.initial_adapter().items() if "lora_" not in key}
        print(f"at the start: {trainer.owner.evaluate(start, {})['eval_accuracy']:.3f}", flush=True)
        sizes = {client: len(rows) for client, rows in trainer.client_datasets.items()}
        for key in [key for key in wanted if key not in done]:
            attack, robust, attackers = key
            server = FederatedServer(
                configs[key], start, trainer.model.peft_config["default"], sizes, trainer.guard.fingerprint
            )
            try:
                server.run(lambda tasks, key=key: train_round(trainer, list(tasks), ATTACKS.get(key[0], flip), key[2]))
                accuracy = trainer.owner.evaluate(server.adapter, server.residual)["eval_accuracy"]
            except RuntimeError as error:
                if "NaN or infinite" not in str(error):
                    raise
                accuracy = None  # so far off that no client's training is finite
            run = {"attack": attack, "robust": robust, "attackers": attackers, "seed": args.seed, "accuracy": accuracy}
            with args.output.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(json.dumps(run), flush=True)
        trainer.owner.close()


if __name__ == "__main__":
    main()
