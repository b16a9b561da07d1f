# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Flower's wrapper for client-level differential privacy in place of ours, in the federations of dp_utility.

    python -m benchmarks.dp_flower --csv docs/dp_utility.csv    # 200 clients, ε 8, 3, 1, three seeds

Model, rows, clients' training, clip, δ and rounds are those of [`dp_utility`]. Aggregation, clip, noise and accounting are Flower's:
`DifferentialPrivacyServerSideFixedClipping` around `FedAvg`, with its `RdpAccountant` in the only mode that the wrapper takes, without
a gain from sampling; its noise is the least with which that accountant stays within ε. 100 of 200 clients take part in each round. Where
it is sound: every client has the same weight (the accountant refuses others), and noise comes from NumPy's global Mersenne Twister, as
it is shipped. Lines that the CSV file has already are not run again. Needs the shared data folder, and the extra `flower`.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant
from flwr.supercore.task_identity import TaskIdentity
from scipy.optimize import brentq

from benchmarks import dp_utility
from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import read_lines, write_lines
from fedlpp_hf.aggregation.round import AggregationResult, RoundUpdates
from fedlpp_hf.server import combine


BY = "Flower's wrapper"
CLIENTS = 200


def make_accountant(clients: int, delta: float, epsilon: float) -> RdpAccountant:
    """Flower's accountant, which ends the run before it exceeds ε."""
    return RdpAccountant(
        PrivacyConfig(
            delta,
            clients,
            NeighboringRelation.ADD_OR_REMOVE_ONE,
            SamplingMethod.NO_AMPLIFICATION,
            epsilon * (1 + 1e-6),
        )
    )


def solve_noise(clients: int, per_round: int, delta: float, epsilon: float, rounds: int) -> float:
    """The least noise multiplier with which Flower's accountant stays within ε."""

    def excess(logarithm: float) -> float:
        accountant = make_accountant(clients, delta, epsilon)
        accountant.compose(GaussianPrivacyEvent(math.exp(logarithm), per_round, clients), rounds)
        return accountant.get_epsilon(delta) - epsilon

    return math.exp(float(brentq(excess, math.log(0.1), math.log(100), xtol=1e-9)))


class FlowerAggregation:
    """Stands in for `aggregate`: the round's updates go through Flower's strategy as messages of its own."""

    def __init__(self, epsilon: float, delta: float, per_round: int, noise: float):
        self.strategy = DifferentialPrivacyServerSideFixedClipping(
            FedAvg(min_train_nodes=per_round, fraction_train=0.001, min_available_nodes=CLIENTS),
            noise,
            dp_utility.CLIP,
            per_round,
            accountant=make_accountant(CLIENTS, delta, epsilon),
        )
        for name in ("task_id", "run_id", "node_id"):
            setattr(TaskIdentity, name, 1)  # what Flower's own processes learn, and messages ask for
        self.round = 0
        self.values = 0
        self.clipped: list[bool] = []

    def __call__(self, rule: str, updates: RoundUpdates, robust: str = "none") -> AggregationResult:
        self.round += 1
        keys = sorted(updates.deltas[0])
        self.values = sum(updates.start[key].numel() for key in keys)
        grid: Any = SimpleNamespace(get_node_ids=lambda: range(1, CLIENTS + 1))
        start = _record({key: updates.start[key] for key in keys})
        asked = list(self.strategy.configure_train(self.round, start, ConfigRecord(), grid))
        if len(asked) != len(updates.deltas):
            raise RuntimeError(f"Flower asked {len(asked)} clients, ours {len(updates.deltas)}.")
        replies = []
        for message, delta in zip(asked, updates.deltas, strict=True):
            changes = {key: delta[key].float() for key in keys}
            norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
            self.clipped.append(norm > dp_utility.CLIP)
            arrays = _record({key: updates.start[key] + change for key, change in changes.items()})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            replies.append(Message(content, reply_to=message))
        mean, _ = self.strategy.aggregate_train(self.round, replies)
        if mean is None:
            raise RuntimeError("Flower's strategy gave no arrays.")
        ended = {key: torch.from_numpy(np.array(array.numpy())) for key, array in mean.items()}
        return AggregationResult({key: ended[key] - updates.start[key] for key in keys})


def _record(tensors: dict[str, torch.Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(tensor.float().numpy()) for key, tensor in tensors.items()})


def run(data: dict[str, Any], epsilon: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One federation as a line of dp_utility's table."""
    began = time.perf_counter()
    per_round, delta = dp_utility.SETTINGS[CLIENTS]
    per_round = dp_utility.QUICK_PER_ROUND if options.quick else per_round
    noise = solve_noise(CLIENTS, per_round, delta, epsilon, options.rounds)
    aggregation = FlowerAggregation(epsilon, delta, per_round, noise)
    # The wrapper draws from NumPy's global generator, which the trainer's seed has set.
    with mock.patch.object(combine, "aggregate", aggregation):
        trainer = dp_utility.train(data, (CLIENTS, epsilon, seed), options)
    spent = aggregation.strategy.privacy_spent()
    if spent is None or spent.num_releases != options.rounds:
        raise RuntimeError(f"Flower's accountant has counted {spent}; expected {options.rounds} releases.")
    start = {"clients": CLIENTS, "ε": epsilon, "seed": seed, "by": BY, "per round": per_round}
    line = dp_utility.measure(trainer.server.store.records())
    line["clipped"] = round(statistics.fmean(aggregation.clipped), 3)
    line |= dp_utility.describe_noise(spent.epsilon, noise, aggregation.values, per_round)
    return start | line | {"s": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds of 20 clients at ε = 8, seed 0")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[8.0, 3.0, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--csv", type=Path, default=Path("out/dp_flower/dp_utility.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/dp_flower"))
    options = parser.parse_args()
    if options.quick:
        options.epsilons, options.seeds, options.rounds = [8.0], [0], 3
        options.csv = options.csv.with_stem(f"{options.csv.stem}_quick")
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(options.csv))
    done = {(float(line["ε"]), int(line["seed"])) for line in lines if line["by"] == BY}
    wanted = [(e, s) for s in options.seeds for e in options.epsilons if (e, s) not in done]
    if wanted:
        data = dp_utility.prepare(options.scratch)
        for epsilon, seed in wanted:
            lines.append(run(data, epsilon, seed, options))
            print(", ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
            write_lines(options.csv, lines)
    print(dp_utility.summarize(read_lines(options.csv)))


if __name__ == "__main__":
    main()
