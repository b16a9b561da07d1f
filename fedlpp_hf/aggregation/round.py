# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What an aggregation rule is given, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig


Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class RoundUpdates:
    """A round's updates, and what they were taken at.

    Args:
        deltas: Δ_i = θ_i − start, with the keys of [`trainable_keys`], in a fixed order of clients. They may be
            [`TensorFile`]s.
        weights: Of the clients, in proportion.
        start: What all clients started from: the proxy, or the untouched adapter where nothing is broadcast.
        adapter: The server's adapter.
        peft_config: Of the adapter.
        residual: What the adapter's rank could not hold in the rounds before, by the adapter's keys.
        num_attackers: Attackers that a robust rule must withstand.
        scale: s, for a rule that averages products: the step is s times their mean. A mean of factors can be multiplied later.
        offset: For such a rule, what to subtract from each Δ_i first, by key.
    """

    deltas: Sequence[Tensors]
    weights: Sequence[float]
    start: Tensors
    adapter: Tensors
    peft_config: PeftConfig
    residual: Tensors = field(default_factory=dict)
    num_attackers: int = 0
    scale: float = 1.0
    offset: Tensors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AggregationResult:
    """What a round's updates come to.

    Args:
        delta: The mean update, for the server's optimizer. Tensors that the round did not train are absent.
        residual: Factors of what the adapter's rank can't hold (`exact`), by the adapter's keys. The server keeps it, hands
            it to the next round's rule and merges it ([`join_residual`]); it is never sent.
        report: For the round's record.
    """

    delta: dict[str, torch.Tensor]
    residual: dict[str, torch.Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
