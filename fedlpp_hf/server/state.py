# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server carries from round to round, as one value."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


Tensors = Mapping[str, torch.Tensor]
_BASE_WEIGHT = "base_weight"


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server after a round.

    Args:
        adapter: The server's adapter θ, float32.
        optimizer: State of the server's optimizer, by name.
        residual: What the adapter's rank can't hold (`exact`), by the adapter's keys.
        base_weight: λ of the server's model W − λE + θ.
    """

    adapter: Tensors
    optimizer: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    base_weight: float = 0.0

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All but the adapter, which has a file for itself, under names that [`from_tensors`] reads."""
        groups = {"optimizer": self.optimizer, "residual": self.residual}
        tensors = {f"{group}:{key}": value for group, tensors in groups.items() for key, value in tensors.items()}
        if self.base_weight:
            tensors[_BASE_WEIGHT] = torch.tensor(self.base_weight, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, adapter: Tensors, tensors: Tensors) -> "ServerState":
        """The inverse of [`to_tensors`].

        Raises:
            ValueError: for a tensor that is no part of a state.
        """
        groups: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            if name == _BASE_WEIGHT:
                continue
            group, _, key = name.partition(":")
            if group not in ("optimizer", "residual") or not key:
                raise ValueError(f"The server's state has `{name}`; expected `optimizer:…` and `residual:…` alone.")
            groups[group][key] = value
        weight = float(tensors[_BASE_WEIGHT]) if _BASE_WEIGHT in tensors else 0.0
        return cls(adapter, groups["optimizer"], groups["residual"], weight)
