# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What record-level differential privacy costs: the server's accuracy on TREC at ε 1, 3, 8 and without a bound, four silos.

    nice taskset -c 0 python -m benchmarks.record_dp                     all settings, three seeds
    nice taskset -c 0 python -m benchmarks.record_dp --quick             ε 8 and without a bound, seed 0

It needs the shared data folder beside the checkout, and prepares TREC and its owner's model (MiniLM) as privacy_frontier does.
Each of four silos has a quarter of the training rows, drawn at random (1,263). All settings take the same steps on the same
expected batch; δ is 1e-5, the clip 1. Lines that the CSV file has already are not run again. Seconds are of the clients' runs,
so that their ratio to the line without a bound is what DP-SGD costs.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import prepare_encoder, read_lines, warm_up, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer


EPSILONS = ("inf", "8", "3", "1")
RULES = ("fedavg", "freeze_a")
ROUNDS, STEPS, BATCH, PARTS = 4, 15, 16, 4  # of each round; a step's batch comes in parts
SILOS, DELTA = 4, 1e-5


def run_setting(data: dict[str, Any], epsilon: str, rule: str, seed: int, scratch: Path) -> dict[str, Any]:
    """One federation, as a line of the table."""
    data = {name: value for name, value in data.items() if name not in ("options", "selection_dataset")}
    budget = {} if epsilon == "inf" else {"record_epsilon": float(epsilon), "record_delta": DELTA}
    args = FederatedConfig(
        str(scratch / f"{epsilon}-{rule}-{seed}"), num_rounds=ROUNDS, num_clients=SILOS, aggregation=rule, max_steps=STEPS,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=PARTS, per_device_eval_batch_size=64,
        learning_rate=2e-3, lr_scheduler_type="constant", max_grad_norm=0.0, adapter_block_size=64, seed=seed, merge=False,
        overwrite=True, report_to=[], use_cpu=True, disable_tqdm=True, **budget,
    )  # fmt: skip
    trainer = FederatedTrainer(data.pop("full_model"), args, **data)
    trainer.train()
    trainer.owner.close()
    records = trainer.server.store.records()
    clients = list(records[-1]["clients"].values())
    line: dict[str, Any] = {"epsilon": epsilon, "rule": rule, "seed": seed}
    line["spent"] = round(max(client.get("record_epsilon", float("inf")) for client in clients), 3)
    line["noise"] = round(clients[0].get("record_noise_multiplier", 0.0), 3)
    for name, metrics in (("before", records[0]["metrics"]), ("after", records[-1]["metrics"])):
        line |= {f"{name}: {key}": round(metrics["server"][f"eval_{key}"], 4) for key in ("loss", "accuracy")}
    seconds = [cost["seconds"] for record in records[1:] for cost in record["traffic"].values()]
    return line | {"seconds": round(sum(seconds), 1)}


def summarize(lines: list[dict[str, str]]) -> str:
    """The table: means over seeds."""
    text = [
        "| rule | ε | noise multiplier | seeds | server's loss | accuracy | before | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rule in RULES:
        plain = [float(line["seconds"]) for line in lines if (line["rule"], line["epsilon"]) == (rule, "inf")]
        for epsilon in EPSILONS:
            group = [line for line in lines if (line["rule"], line["epsilon"]) == (rule, epsilon)]
            if not group:
                continue
            mean = {
                name: statistics.fmean(float(line[name]) for line in group)
                for name in ("noise", "after: loss", "after: accuracy", "before: accuracy", "seconds")
            }
            time = f"{mean['seconds'] / statistics.fmean(plain):.1f}" if plain else ""
            text.append(
                f"| {rule} | {epsilon} | {mean['noise']:.2f} | {len(group)} | {mean['after: loss']:.3f} "
                f"| {mean['after: accuracy']:.1%} | {mean['before: accuracy']:.1%} | {time} |"
            )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fedavg, ε 8 and without a bound, seed 0")
    parser.add_argument("--epsilons", nargs="+", choices=EPSILONS, default=list(EPSILONS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, default=Path("out/record_dp/record_dp.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/record_dp"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epsilons, arguments.rules, arguments.seeds = ["inf", "8"], ["fedavg"], [0]
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")

    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["epsilon"], line["rule"], str(line["seed"])) for line in lines}
    wanted = [(e, r, s) for s in arguments.seeds for r in arguments.rules for e in arguments.epsilons]
    wanted = [setting for setting in wanted if (*setting[:2], str(setting[2])) not in done]
    if wanted:
        data = prepare_encoder("trec")
        warm_up(data, arguments.scratch)
        for epsilon, rule, seed in wanted:
            lines.append(run_setting(data, epsilon, rule, seed, arguments.scratch / "runs"))
            print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
            write_lines(arguments.csv, lines)
    print(summarize(list(read_lines(arguments.csv))))


if __name__ == "__main__":
    main()
