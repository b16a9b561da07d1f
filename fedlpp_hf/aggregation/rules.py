# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""One round's aggregation by the rules that the options name."""

from dataclasses import replace
from importlib import import_module

from ..config.rules import RULES, trainable_keys
from ..tensors.adapters import check_keys
from .mean import normalize_weights
from .robust import coordinate_median, gram_matrix, krum_weights, trimmed_mean
from .round import AggregationResult, RoundUpdates


def aggregate(rule: str, updates: RoundUpdates, robust: str = "none") -> AggregationResult:
    """Aggregate in the order of the updates, which must not depend on who answered first.

    Args:
        rule: A name in [`RULES`]; its function is in the file that the table names.
        updates: The round's updates. [`check_rules`] says which options go together.
        robust: A name in [`ROBUST_RULES`].

    Raises:
        ValueError: if there are no updates, they differ from the adapter, or are too few for the robust rule.
    """
    if not updates.deltas:
        raise ValueError("There are no updates to aggregate; a round needs at least one.")
    keys = trainable_keys(rule, updates.adapter)
    for place, delta in enumerate(updates.deltas):
        check_keys(delta, keys, f"update of client {place}")
    if robust == "median":
        return AggregationResult(coordinate_median(updates.deltas))
    if robust == "trimmed_mean":
        return AggregationResult(trimmed_mean(updates.deltas, updates.num_attackers))
    shares, report = normalize_weights(updates.weights), {}
    if robust == "multi_krum":
        selected = len(updates.deltas) - updates.num_attackers
        weights = krum_weights(gram_matrix(updates.deltas), updates.num_attackers, selected)
        shares = normalize_weights(weights)
        report["client_weights"] = shares
    result = import_module(f".{RULES[rule].module}", __package__).aggregate(updates, shares)
    return replace(result, report=report | result.report)
