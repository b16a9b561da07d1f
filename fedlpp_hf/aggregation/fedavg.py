# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""FedAvg: the weighted mean of the factors (`fedavg`), or of B alone where A is frozen (`freeze_a`)."""

from collections.abc import Sequence

from .mean import sum_updates
from .round import AggregationResult, RoundUpdates


def aggregate(updates: RoundUpdates, shares: Sequence[float]) -> AggregationResult:
    """Δ̄ = Σ p_i Δ_i (FedAvg, arXiv 1602.05629), with `shares` p_i."""
    return AggregationResult(sum_updates(updates.deltas, shares))
