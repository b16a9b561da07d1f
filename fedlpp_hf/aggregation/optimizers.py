# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Server optimizers: how the mean update moves the server's adapter. Pure functions of adapter, update and state."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


OPTIMIZERS = ("sgd", "adagrad", "adam", "yogi")


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """One step of the server on the pseudo-gradient −Δ̄, Δ̄ being the mean update.

    `sgd` with `learning_rate=1` and no momentum is FedLPP's rule θ + Δ̄, with momentum it is FedAvgM (arXiv 1909.06335);
    `adagrad`, `adam` and `yogi` are Algorithm 2 of FedOpt (arXiv 2003.00295), with its second moment that starts at τ²
    and without bias correction. `momentum` belongs to `sgd`; `beta1`, `beta2` (not `adagrad`) and `tau` to the others,
    whose learning rate is the size of a step per coordinate: 0.01 to 0.1, not 1.
    """

    name: str = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"server_optimizer={self.name!r}; expected one of {', '.join(OPTIMIZERS)}.")
        for name in ("learning_rate", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} of the server; expected a positive number.")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of the server; expected a number in [0, 1).")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum={self.momentum} belongs to sgd; {self.name} has beta1.")

    def step(
        self,
        adapter: Mapping[str, torch.Tensor],
        delta: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The adapter and the optimizer's state after `delta`; nothing is written to.

        `state` holds `momentum.<key>` and `second_moment.<key>` in the shapes of the adapter, and is empty at the start.
        Tensors of which `delta` has nothing stay as they are, and so does their state: a factor that this round did not
        train has no gradient of zero, it has none.

        Raises:
            ValueError: if `delta` has a tensor that the adapter lacks, or of another shape.
        """
        new_adapter, new_state = dict(adapter), dict(state)
        for key, change in delta.items():
            if key not in adapter or adapter[key].shape != change.shape:
                raise ValueError(f"The mean update's `{key}` {tuple(change.shape)} is no tensor of the adapter.")
            if self.name != "sgd":
                change = self._scale(key, change, new_state)
            elif self.momentum:
                change = change + self.momentum * state.get(f"momentum.{key}", 0.0)
                new_state[f"momentum.{key}"] = change
            new_adapter[key] = adapter[key] + self.learning_rate * change
        return new_adapter, new_state

    def _scale(self, key: str, change: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        first = self.beta1 * state.get(f"momentum.{key}", 0.0) + (1 - self.beta1) * change
        square = change.square()
        second = state.get(f"second_moment.{key}")
        if second is None:
            second = torch.full_like(change, self.tau**2)
        if self.name == "adagrad":
            second = second + square
        elif self.name == "yogi":
            second = second - (1 - self.beta2) * square * (second - square).sign()
        else:
            second = self.beta2 * second + (1 - self.beta2) * square
        state[f"momentum.{key}"], state[f"second_moment.{key}"] = first, second
        return first / (second.sqrt() + self.tau)
