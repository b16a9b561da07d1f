# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What client-level differential privacy costs: the server's model at several ε, with 200 and 2,000 simulated clients.

    python -m benchmarks.dp_utility --csv docs/dp_utility.csv   # all of it; about five hours on an idle core
    python -m benchmarks.dp_utility --shares --csv docs/dp_utility.csv   # noise in shares under secure sums instead, ε 8, 3, 1
    python -m benchmarks.dp_utility --quick                     # four lines of three rounds, in six minutes
    python -m benchmarks.dp_utility --arithmetic                # how long the noise is beside one update; trains nothing

MiniLM on TREC: the owner tunes it on 400 questions for 30 steps, and the others are dealt out to the clients, 25 or two to three to
each. Clients train B (rank 2) and the head by SGD for an epoch. Poisson sampling, freeze_a, a 4-bit base, an 8-bit proxy. ε = inf has
the same clip and equal weights, but no noise. The clip is the length of one local step, whose gradient is clipped to 1. Lines that
the CSV file has already are not run again. Needs the shared data folder beside the checkout.
"""

import argparse
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from peft import LoraConfig

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import prepare_encoder, read_lines, warm_up, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.privacy.accounting import ClientSampling, solve_multiplier, solve_noise
from fedlpp_hf.privacy.noise_shares import NoiseShares, compute_share_epsilon
from fedlpp_hf.privacy.secure_sums.terms import compute_threshold
from fedlpp_hf.server.sampling import sample_clients


# Clients: those of a round on average, and δ, below 1 / clients.
SETTINGS = {200: (100, 1e-3), 2000: (200, 1e-4)}
QUICK_PER_ROUND = 20
VALUES = (48_500, 2_200)  # of an adapter of rank 8; of its r×r cores alone
LEARNING_RATE = CLIP = 0.3
OURS, SHARES = "ours", "ours, in shares"
WARM_UP_STEPS = 30  # with 50, the owner's model is nearly as good as it gets


def run(data: dict[str, Any], clients: int, epsilon: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One federation as a line of the table."""
    per_round, delta = SETTINGS[clients]
    per_round = QUICK_PER_ROUND if options.quick else per_round
    private = {"target_epsilon": epsilon, "target_delta": delta}
    # Clients that add the noise themselves are drawn in a fixed number; one of a round may collude with the server.
    private |= {"secure_aggregation": True} if options.shares else {"client_sampling": "poisson"}
    finite = math.isfinite(epsilon)
    began = time.perf_counter()
    trainer = train(data, (clients, epsilon, seed), options, clip_update_norm=CLIP, **(private if finite else {}))
    records = trainer.server.store.records()
    clipped = [client["clipped"] for record in records for client in record["clients"].values() if "clipped" in client]
    line = measure(records)
    if clipped:  # a secure sum does not tell
        line["clipped"] = round(statistics.fmean(clipped), 3)
    if trainer.server.dp is not None:
        privacy = records[-1]["privacy"]
        values = sum(shape.numel() for shape in trainer.server.dp.shapes.values())
        multiplier = privacy["noise_multiplier"]
        line |= describe_noise(privacy["epsilon"], multiplier, values, per_round)
        if options.shares:  # the multiplier is of those whose noise counts; the others' is in the sum, too
            counted = compute_threshold(trainer.args.secure_threshold, per_round) - trainer.args.colluding_clients
            line["noise / clip"] = round(line["noise / clip"] * math.sqrt(per_round / counted), 3)
    by = SHARES if options.shares else OURS
    start = {"clients": clients, "ε": epsilon, "seed": seed, "by": by, "per round": per_round}
    return start | line | {"s": round(time.perf_counter() - began)}


def prepare(scratch: Path) -> dict[str, Any]:
    """The rows, and the owner's model in `full_model`."""
    data = prepare_encoder("trec")
    rows, _, rate = data["warm_up"]
    data["warm_up"] = (rows, WARM_UP_STEPS, rate)
    warm_up(data, scratch / "trec")
    return data


def train(
    data: dict[str, Any], setting: tuple[int, float, int], options: argparse.Namespace, **private: Any
) -> FederatedTrainer:
    """A federation that has run to its end, with the options `private`."""
    clients, epsilon, seed = setting
    args = FederatedConfig(
        str(options.scratch / f"{clients}-{epsilon:g}-{seed}"),
        num_rounds=options.rounds,
        num_clients=clients,
        clients_per_round=QUICK_PER_ROUND if options.quick else SETTINGS[clients][0],
        aggregation="freeze_a",
        weighting="uniform",
        **private,
        adapter_bits=8,
        adapter_block_size=64,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        seed=seed,
        merge=False,
        overwrite=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    names = ("train_dataset", "eval_dataset", "processing_class", "data_collator", "compute_metrics", "model_class")
    trainer = FederatedTrainer(
        data["full_model"],
        args,
        **{name: data[name] for name in names},
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
    )
    trainer.train()
    trainer.owner.close()
    return trainer


def measure(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The server's model before and after."""
    first, last = records[0]["metrics"]["server"], records[-1]["metrics"]["server"]
    return {
        "rounds": len(records) - 1,
        "accuracy before": round(first["eval_accuracy"], 4),
        "accuracy": round(last["eval_accuracy"], 4),
        "loss before": round(first["eval_loss"], 4),
        "loss": round(last["eval_loss"], 4),
    }


def describe_noise(spent: float, multiplier: float, values: int, per_round: int) -> dict[str, float]:
    """What was spent, and how long the noise on a round's mean of `values` values is."""
    return {
        "ε spent": round(spent, 3),
        "noise multiplier": round(multiplier, 3),
        "noise / clip": round(multiplier * math.sqrt(values) / per_round, 3),
    }


def summarize(lines: list[dict[str, str]]) -> str:
    """The table: means and ranges over the seeds."""
    text = [
        "| clients | in a round | noise by | ε | seeds | noise / clip, each round | accuracy before | accuracy after | loss after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[int, float, str], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault((int(line["clients"]), -float(line["ε"]), line["by"]), []).append(line)
    for (clients, epsilon, by), group in sorted(groups.items()):
        accuracy = [float(line["accuracy"]) for line in group]
        mean = {
            name: statistics.fmean(float(line.get(name) or 0) for line in group)
            for name in ("noise / clip", "accuracy before", "loss")
        }
        text.append(
            f"| {clients} | {group[0]['per round']} | {by} | {-epsilon:g} | {len(group)} | {mean['noise / clip']:.2f} | "
            f"{mean['accuracy before']:.3f} | {statistics.fmean(accuracy):.3f} ({min(accuracy):.3f} to {max(accuracy):.3f}) | "
            f"{mean['loss']:.3f} |"
        )
    return "\n".join(text)


def tabulate_noise(epsilon: float = 8.0, rounds: int = 10) -> str:
    """How many times as long as the clip the noise on a round's mean is, z·√d / m, for d values and m clients in a round."""
    text = [
        f"| clients | in a round | sampling | δ | z for ε = {epsilon:g} in {rounds} rounds | "
        + " | ".join(f"noise / clip, {values:,} values" for values in VALUES)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(VALUES),
    ]
    for sampling, delta in (
        (ClientSampling("fixed", 4, 4), 1e-2),
        (ClientSampling("poisson", 4, 4), 1e-2),
        (ClientSampling("poisson", 25, 25), 1e-2),
        (ClientSampling("poisson", 220, 220), 1e-3),
        (ClientSampling("poisson", 2000, 220), 1e-4),
        (ClientSampling("fixed", 2000, 220), 1e-4),
        (ClientSampling("poisson", 100_000, 1000), 1e-6),
    ):
        noise = solve_noise(epsilon, delta, sampling, rounds)
        ratios = [noise * math.sqrt(values) / sampling.per_round for values in VALUES]
        cells = [f"{sampling.clients:,}", f"{sampling.per_round:,}", sampling.kind, f"{delta:g}", f"{noise:.2f}"]
        text.append("| " + " | ".join([*cells, *(f"{ratio:.2f}" for ratio in ratios)]) + " |")
    for clients, drawn, colluders, delta in (
        (25, 25, 1, 1e-2),
        (220, 220, 1, 1e-3),
        (220, 220, 22, 1e-3),
        (2000, 220, 1, 1e-4),
    ):
        counted = compute_threshold(2 / 3, drawn) - colluders
        draws = FederatedConfig(
            "out", report_to=[], use_cpu=True, clients_per_round=drawn, num_clients=clients, seed=0
        )
        ids = [str(number) for number in range(clients)]
        often = Counter(client for number in range(rounds) for client in sample_clients(draws, ids, number + 1))
        most = max(often.values())  # rounds that a client is in

        def spend(noise: float, colluders: int = colluders, delta: float = delta, most: int = most) -> float:
            return compute_share_epsilon({NoiseShares(noise, colluders, VALUES[0]): most}, delta)

        noise = solve_multiplier(epsilon, spend, f"{rounds} rounds", delta)
        ratios = [noise * math.sqrt(drawn / counted * values) / drawn for values in VALUES]
        cells = [
            f"{clients:,}",
            f"{drawn:,}",
            f"in shares, {colluders} of them may collude",
            f"{delta:g}",
            f"{noise:.2f}",
        ]
        text.append("| " + " | ".join([*cells, *(f"{ratio:.2f}" for ratio in ratios)]) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds of 20 clients at ε = inf and 8, seed 0")
    parser.add_argument("--clients", nargs="+", type=int, choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shares", action="store_true", help="noise in shares under secure sums, 200 clients")
    parser.add_argument("--csv", type=Path, default=Path("out/dp_utility/dp_utility.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/dp_utility"))
    parser.add_argument("--arithmetic", action="store_true", help="how long the noise is beside one update")
    options = parser.parse_args()
    if options.arithmetic:
        print(tabulate_noise())
        return
    if options.quick:
        options.epsilons, options.seeds, options.rounds = [math.inf, 8.0], [0], 3
        options.csv = options.csv.with_stem(f"{options.csv.stem}_quick")
    if options.shares:
        options.clients, options.epsilons = [200], [value for value in options.epsilons if math.isfinite(value)]
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(options.csv))
    by = SHARES if options.shares else OURS
    done = {(int(line["clients"]), float(line["ε"]), int(line["seed"])) for line in lines if line["by"] == by}
    wanted = [(n, e, s) for s in options.seeds for n in options.clients for e in options.epsilons]
    wanted = [values for values in wanted if values not in done]
    if wanted:
        data = prepare(options.scratch)
        for clients, epsilon, seed in wanted:
            lines.append(run(data, clients, epsilon, seed, options))
            print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
            write_lines(options.csv, lines)
    print(summarize(read_lines(options.csv)))


if __name__ == "__main__":
    main()
