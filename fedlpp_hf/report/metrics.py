# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A round's record as numbers."""

from collections.abc import Mapping
from typing import Any

from ..config.metrics import is_number


Record = Mapping[str, Any]


def flatten_record(record: Record) -> dict[str, float]:
    """A record as numbers by name, for trackers; metrics that are no numbers are left out."""
    logs = {f"{view}/{name}": value for view, metrics in record["metrics"].items() for name, value in metrics.items()}
    logs = {name: value for name, value in logs.items() if is_number(value)}
    if record["clients"]:
        logs["clients/loss"] = mean_client_loss(record)
    return logs | {name: record[name] for name in ("bytes_down", "bytes_up", "seconds")}


def mean_client_loss(record: Record) -> float:
    """Training loss of the round's clients, weighted by their examples."""
    clients = record["clients"].values()
    total = sum(client["num_examples"] for client in clients)
    return sum(client["num_examples"] * client["loss"] for client in clients) / total
