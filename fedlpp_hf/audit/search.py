# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The search over what training on a client's own rows makes of an adapter, the same for attackers and for local-only."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from .attacks import Adapter, fine_tune


# An attacker tries the learning rate that it was told, and a lower one, as what it starts from has been trained before.
LEARNING_RATE_FACTORS = (1.0, 0.3)


def digest_adapter(adapter: Mapping[str, Any]) -> bytes:
    """What is the same for adapters with equal values."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in adapter.values())).digest()


class TrainingSearch:
    """Trains adapters on `rows`; equal adapters once.

    Args:
        trainer: The federation's trainer.
        rows: Prepared rows: a client's, or those of a coalition.
        find_loss: An adapter's loss on the audit's rows, infinite if it diverged. It chooses what is trained longer.
    """

    def __init__(self, trainer: Any, rows: Any, find_loss: Callable[[Adapter], float]):
        self.trainer, self.rows, self.find_loss = trainer, rows, find_loss
        self._known: dict[tuple[bytes, float, tuple[int, ...]], dict[int, Adapter]] = {}

    def search(self, starts: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """`starts` after training, by start, steps and learning rate.

        Each is trained for `audit_steps` at each rate. The run with the best loss, at its half or its end, is made again with the
        same batches and goes on to `audit_longer` times as many steps: the best alone, as every run as long would cost most.
        """
        steps, longer = self.trainer.args.audit_steps, self.trainer.args.audit_longer
        found: dict[str, Adapter] = {}
        losses: dict[tuple[str, float], float] = {}
        for name, start in starts.items():
            for factor in LEARNING_RATE_FACTORS:
                rate = factor * self.trainer.args.learning_rate
                taken = self._train(start, rate, (max(1, steps // 2), steps))
                found |= _name(name, rate, taken)
                losses[name, rate] = min(map(self.find_loss, taken.values()))
        finite = {run: loss for run, loss in losses.items() if math.isfinite(loss)}
        if finite and longer > 1:
            name, rate = min(finite, key=finite.__getitem__)
            found |= _name(name, rate, self._train(starts[name], rate, (longer * steps // 2, longer * steps)))
        return found

    def _train(self, start: Adapter, rate: float, steps: tuple[int, ...]) -> dict[int, Adapter]:
        key = digest_adapter(start), rate, steps
        if key not in self._known:
            self._known[key] = fine_tune(self.trainer, self.rows, start, steps, rate, self.trainer.args.seed)
        return self._known[key]


def _name(start: str, rate: float, taken: Mapping[int, Adapter]) -> dict[str, Adapter]:
    return {f"{start} + {steps} steps at {rate:.1g}": adapter for steps, adapter in taken.items()}
