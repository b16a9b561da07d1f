# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server asks of the owner: adapters and metrics, never a model."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch


Tensors = Mapping[str, torch.Tensor]


class Owner(Protocol):
    """Whoever holds the full model W and answers for it; [`OwnerProcess`] does."""

    def evaluate(self, adapter: Tensors, residual: Tensors | None = None) -> dict[str, float]:
        """Metrics of W + θ; `residual` is what θ's rank could not hold."""
        ...

    def estimate_variate(
        self, start: Tensors, round_number: int, seeds: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """What the quantizer adds to an update taken at `start`, and the share of the estimate that is not chance."""
        ...
