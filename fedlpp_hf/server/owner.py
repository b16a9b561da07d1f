# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server asks of the owner: adapters and metrics, never a model."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch


Tensors = Mapping[str, torch.Tensor]


class Owner(Protocol):
    """Whoever holds the full model W and answers for it; [`OwnerProcess`] does."""

    @property
    def selects(self) -> bool:
        """Whether the owner has rows to choose by."""
        ...

    def evaluate(
        self, adapter: Tensors, residual: Tensors | None = None, base_weight: float = 0.0
    ) -> dict[str, float]:
        """Metrics of W − λE + θ, λ being `base_weight`; `residual` is what θ's rank could not hold."""
        ...

    def measure_selection(self, adapter: Tensors, residual: Tensors, base_weights: Sequence[float]) -> list[float]:
        """The loss of W − λE + θ on the owner's selection rows, for each λ; infinite where it is no number."""
        ...

    def begin_variate(self, start: Tensors, round_number: int, seeds: Sequence[int]) -> None:
        """Told before the clients train that [`estimate_variate`] will be asked for the same; may begin with it."""
        ...

    def estimate_variate(
        self, start: Tensors, round_number: int, seeds: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """What the quantizer adds to an update taken at `start`, and the share of the estimate that is not chance."""
        ...


@contextmanager
def counted_wait(record: dict[str, Any]) -> Iterator[None]:
    """Add what an answer of the owner is waited for to `owner_seconds` of a round's record."""
    asked = time.perf_counter()
    yield
    record["owner_seconds"] = record.get("owner_seconds", 0.0) + time.perf_counter() - asked
