# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which metric counts, what is better, and a round's record as numbers."""

from collections.abc import Mapping
from typing import Any


Record = Mapping[str, Any]


def main_metric(metrics: Mapping[str, float]) -> str | None:
    """The metric that is shown: the first that is not the loss, else the loss."""
    names = [name for name in metrics if not name.endswith("loss")] + [
        name for name in metrics if name.endswith("loss")
    ]
    return names[0] if names else None


def is_better(name: str, value: float, other: float) -> bool:
    """Whether `value` of a metric is better than `other`; losses and perplexities are better when small."""
    return value < other if name.endswith(("loss", "perplexity")) else value > other


def flatten_record(record: Record) -> dict[str, float]:
    """A record as numbers by name, for trackers."""
    logs = {f"{view}/{name}": value for view, metrics in record["metrics"].items() for name, value in metrics.items()}
    if record["clients"]:
        logs["clients/loss"] = mean_client_loss(record)
    return logs | {name: record[name] for name in ("bytes_down", "bytes_up", "seconds")}


def mean_client_loss(record: Record) -> float:
    """Training loss of the round's clients, weighted by their examples."""
    clients = record["clients"].values()
    total = sum(client["num_examples"] for client in clients)
    return sum(client["num_examples"] * client["loss"] for client in clients) / total
