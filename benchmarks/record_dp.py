# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What record-level differential privacy costs: the server's loss at ε 1, 3, 8 and without a bound, with four silos.

    nice taskset -c 0 python -m benchmarks.record_dp                     both tasks, all settings, three seeds
    nice taskset -c 0 python -m benchmarks.record_dp --quick             rnnlg with fedavg, seed 0

It needs the shared data folder beside the checkout, and prepares tasks and owner's models as privacy_frontier does: stories260K
on rnnlg (a silo is a domain), MiniLM on TREC (a silo is a random quarter, 1,263 rows). All settings of a task take the same steps
on the same expected batch; δ is 1e-5, the clip 1. Lines that the CSV file has already are not run again. Seconds are of the
clients' runs; their ratio to the line without a bound is what DP-SGD costs.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import (
    ENCODER,
    mean_of,
    prepare_encoder,
    prepare_stories,
    read_lines,
    warm_up,
    write_lines,
)
from fedlpp_hf import FederatedConfig, FederatedTrainer


TASKS = ("rnnlg", "trec")
EPSILONS = ("inf", "8", "3", "1")
RULES = ("fedavg", "freeze_a")
ROUNDS, STEPS, BATCH, PARTS = 4, 15, 16, 4  # of each round; a step's batch comes in parts
SILOS, DELTA = 4, 1e-5


def run_setting(data: dict[str, Any], setting: tuple[str, str, str, int], scratch: Path) -> dict[str, Any]:
    """One federation, as a line of the table."""
    task, epsilon, rule, seed = setting
    silos = {"num_clients": SILOS} if task in ENCODER else {"partition": "domain"}
    data = {name: value for name, value in data.items() if name not in ("options", "selection_dataset")}
    budget = {} if epsilon == "inf" else {"record_epsilon": float(epsilon), "record_delta": DELTA}
    args = FederatedConfig(
        str(scratch / f"{task}-{epsilon}-{rule}-{seed}"), num_rounds=ROUNDS, aggregation=rule, max_steps=STEPS,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=PARTS, per_device_eval_batch_size=64,
        learning_rate=2e-3, lr_scheduler_type="constant", max_grad_norm=0.0, adapter_block_size=64, seed=seed, merge=False,
        overwrite=True, report_to=[], use_cpu=True, disable_tqdm=True, **silos, **budget,
    )  # fmt: skip
    trainer = FederatedTrainer(data.pop("full_model"), args, **data)
    trainer.train()
    trainer.owner.close()
    records = trainer.server.store.records()
    clients = list(records[-1]["clients"].values())
    line: dict[str, Any] = {"task": task, "epsilon": epsilon, "rule": rule, "seed": seed}
    line["spent"] = round(max(client.get("record_epsilon", float("inf")) for client in clients), 3)
    line["noise"] = round(clients[0].get("record_noise_multiplier", 0.0), 3)
    for name, metrics in (("before", records[0]["metrics"]), ("after", records[-1]["metrics"])):
        found = {key.removeprefix("eval_"): value for key, value in metrics["server"].items()}
        line |= {f"{name}: {key}": round(found[key], 4) for key in ("loss", "accuracy") if key in found}
    seconds = [cost["seconds"] for record in records[1:] for cost in record["traffic"].values()]
    return line | {"seconds": round(sum(seconds), 1)}


def summarize(lines: list[dict[str, str]]) -> str:
    """The table: means over seeds."""
    text = [
        "| task | rule | ε | noise multiplier | seeds | server's loss | before | accuracy | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, rule in itertools.product(TASKS, RULES):
        mine = [line for line in lines if (line["task"], line["rule"]) == (task, rule)]
        plain = mean_of([line for line in mine if line["epsilon"] == "inf"], "seconds")
        for epsilon in EPSILONS:
            group = [line for line in mine if line["epsilon"] == epsilon]
            if not group:
                continue
            accuracy = mean_of(group, "after: accuracy")
            cells = [task, rule, epsilon, f"{mean_of(group, 'noise'):.2f}", str(len(group))]
            cells += [f"{mean_of(group, f'{name}: loss'):.3f}" for name in ("after", "before")]
            cells.append(f"{accuracy:.1%}" if accuracy == accuracy else "")
            text.append("| " + " | ".join([*cells, f"{mean_of(group, 'seconds') / plain:.1f}"]) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rnnlg with fedavg, seed 0")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epsilons", nargs="+", choices=EPSILONS, default=list(EPSILONS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, default=Path("out/record_dp/record_dp.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/record_dp"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.rules, arguments.seeds = ["rnnlg"], ["fedavg"], [0]
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")

    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["task"], line["epsilon"], line["rule"], int(line["seed"])) for line in lines}
    for task in arguments.tasks:
        settings = itertools.product([task], arguments.epsilons, arguments.rules, arguments.seeds)
        wanted = [setting for setting in settings if setting not in done]
        if not wanted:
            continue
        data = prepare_encoder(task) if task in ENCODER else prepare_stories(task)
        warm_up(data, arguments.scratch / task)
        for setting in wanted:
            lines.append(run_setting(data, setting, arguments.scratch / "runs"))
            print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
            write_lines(arguments.csv, lines)
    print(summarize(list(read_lines(arguments.csv))))


if __name__ == "__main__":
    main()
