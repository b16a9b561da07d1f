# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Server optimizers: how the mean update moves the server's adapter. Pure functions of adapter, update and state."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


# Of Yogi, as FedOpt has them (arXiv 2003.00295): decay of both moments, and adaptivity.
BETA1, BETA2, TAU = 0.9, 0.99, 1e-3


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """One step of the server on the pseudo-gradient −Δ̄, Δ̄ being the mean update.

    Args:
        name: `sgd` with `learning_rate=1` and no momentum is the paper's rule θ + Δ̄; with momentum it is FedAvgM (arXiv
            1909.06335). `yogi` is Algorithm 2 of FedOpt (arXiv 2003.00295), with its second moment that starts at τ² and
            without bias correction.
        learning_rate: Of `yogi` the size of a step per coordinate: 0.01 to 0.1, not 1.
        momentum: Of `sgd`.
    """

    name: str = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.0

    def step(
        self,
        adapter: Mapping[str, torch.Tensor],
        delta: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The adapter and the optimizer's state after `delta`; nothing is written to.

        `state` holds `momentum.<key>` and `second_moment.<key>` in the shapes of the adapter, and is empty at the start.
        Tensors that are not in `delta` stay as they are, and so does their state: a factor that this round did not train has
        no gradient at all, rather than one of zero.

        Raises:
            ValueError: if `delta` has a tensor that is not in the adapter, or of another shape.
        """
        new_adapter, new_state = dict(adapter), dict(state)
        for key, change in delta.items():
            if key not in adapter or adapter[key].shape != change.shape:
                expected = tuple(adapter[key].shape) if key in adapter else "no such tensor"
                raise ValueError(
                    f"The mean update has `{key}` of shape {tuple(change.shape)}; the adapter has {expected}. Use the "
                    "same LoraConfig on all clients."
                )
            if self.name == "yogi":
                change = _yogi(key, change, new_state)
            elif self.momentum:
                change = change + self.momentum * state.get(f"momentum.{key}", 0.0)
                new_state[f"momentum.{key}"] = change
            new_adapter[key] = adapter[key] + self.learning_rate * change
        return new_adapter, new_state


def _yogi(key: str, change: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    first = BETA1 * state.get(f"momentum.{key}", 0.0) + (1 - BETA1) * change
    square = change.square()
    second = state.get(f"second_moment.{key}")
    if second is None:
        second = torch.full_like(change, TAU**2)
    second = second - (1 - BETA2) * square * (second - square).sign()
    state[f"momentum.{key}"], state[f"second_moment.{key}"] = first, second
    return first / (second.sqrt() + TAU)
