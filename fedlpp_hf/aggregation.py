# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From clients' updates to one mean update. Pure functions of mappings of tensors, in double precision."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from .adapters import check_keys


def normalize_weights(weights: Sequence[float]) -> list[float]:
    """`weights` divided by their sum.

    Raises:
        ValueError: if one is negative or not finite, or if their sum is not positive.
    """
    for place, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"Weight {weight} of client {place}; expected a finite number, at least 0.")
    largest = max(weights, default=0.0)
    if not largest > 0:
        raise ValueError(f"The weights of {len(weights)} updates sum to 0; at least one update must count.")
    shares = [weight / largest for weight in weights]  # the sum of huge weights could overflow
    total = math.fsum(shares)
    return [share / total for share in shares]


def average_updates(
    updates: Iterable[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The weighted mean of `updates`, tensor by tensor, float32: Δ̄ = Σ p_i Δ_i (FedAvg, arXiv 1602.05629).

    One update at a time is read, so that with updates that are files, opened as they are iterated over, memory is flat in
    their number: two adapters for the sum in double precision, and one tensor. Give them in a fixed order of clients: sums
    are rounded, and the order of arrival must not show in the result.

    Raises:
        ValueError: if updates differ in keys or shapes, or the weights fit neither their number nor [`normalize_weights`].
    """
    shares = normalize_weights(weights)
    sums: dict[str, torch.Tensor] = {}
    for place, (update, share) in enumerate(zip(updates, shares, strict=True)):
        if not sums:
            sums = {key: torch.zeros(update[key].shape, dtype=torch.float64) for key in update}
        check_keys(update, sums, f"update of client {place}")
        for key, total in sums.items():
            tensor = update[key]
            if tensor.shape != total.shape:
                raise ValueError(
                    f"`{key}` of client {place} has shape {tuple(tensor.shape)}; the first client's has "
                    f"{tuple(total.shape)}. Mixed ranks need a rule that supports them."
                )
            total.add_(tensor, alpha=share)
    return {key: sums.pop(key).float() for key in list(sums)}
