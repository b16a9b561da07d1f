# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Metrics as JSON holds them, and a round's record as numbers."""

from collections.abc import Mapping
from typing import Any

from ..config.metrics import is_number


Record = Mapping[str, Any]
_CHOSEN = ("selection_loss", "base_weight", "variate_weight", "update_scale")


def flatten_record(record: Record) -> dict[str, float]:
    """A record as numbers by name, for trackers, in groups; what is no number is left out."""
    logs = {f"{view}/{name}": value for view, metrics in record["metrics"].items() for name, value in metrics.items()}
    logs |= {f"owner/{name}": record.get(name) for name in _CHOSEN}
    logs |= {f"privacy/{name}": record.get("privacy", {}).get(name) for name in ("epsilon", "clip_norm")}
    if record["round"]:
        logs |= {"clients/accepted": len(record["clients"]), "clients/rejected": len(record["rejected"])}
        logs |= {"bytes/down": record["bytes_down"], "bytes/up": record["bytes_up"]}
        logs |= {"time/seconds": record["seconds"], "time/owner": record.get("owner_seconds")}
    if record["clients"]:
        logs["clients/loss"] = mean_client_loss(record)
    return {name: value for name, value in logs.items() if is_number(value)}


def mean_client_loss(record: Record) -> float:
    """Training loss of the round's clients, weighted by their examples; under secure aggregation, by nothing."""
    if "sum" in record:
        return record["sum"]["loss"]
    clients = record["clients"].values()
    total = sum(client["num_examples"] for client in clients)
    return sum(client["num_examples"] * client["loss"] for client in clients) / total


def count_steps(record: Record) -> int:
    """Local steps of all clients of a round."""
    if "sum" in record:
        return record["sum"]["steps"]
    return sum(client["steps"] for client in record["clients"].values())


def keep_values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `metrics` that JSON can hold; arrays and tensors become numbers and lists, keys become text."""
    kept = {}
    for name, value in metrics.items():
        try:
            kept[str(name)] = _convert(value)
        except TypeError:
            continue
    return kept


def _convert(value: Any) -> Any:
    """
    Raises:
        TypeError: if JSON can't hold the value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # A subclass, such as numpy.float64, is written as what it is.
        return value if value is None or type(value) in (bool, int, float, str) else _plain(value)
    import numpy as np  # not before something else than JSON's own values comes: a report needs neither
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        return _convert(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _convert(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_convert(entry) for entry in value]
    raise TypeError(type(value).__name__)


def _plain(value: Any) -> Any:
    return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
