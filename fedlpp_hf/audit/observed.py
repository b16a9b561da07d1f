# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""One update as an attacker at the server sees it, and the tests that its factors allow on inputs of their layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..tensors.lora import LoraFactors
from .spans import RowSpace, find_row_space, measure_distance, rounding_noise, undo_adam


NEAR = 0.1  # of the median distance: almost none of all tokens are in a batch, so the median is that of a stranger


@dataclass(frozen=True, slots=True)
class ObservedUpdate:
    """Δ and what the server knows of how it came about.

    Args:
        delta: Δ, or the sum of several clients', by key of the adapter.
        start: The proxy that it is the difference to.
        noise: Standard deviation of the noise that was added to each value.
        relative_noise: Error of each value as a share of its tensor's root mean square: what quantization does.
        adam_rate: The learning rate, if the run was one single step of Adam; else None.
    """

    delta: Mapping[str, torch.Tensor]
    start: Mapping[str, torch.Tensor]
    noise: float = 0.0
    relative_noise: float = 0.0
    adam_rate: float | None = None

    def read_factor(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A factor's gradient, up to a scale, and the noise of each of its values."""
        delta = self.delta[key].float()
        end = self.start[key].float() + delta
        added = (self.noise**2 + self.relative_noise**2 * delta.square().mean()) ** 0.5
        if self.adam_rate is not None:
            if float(added):  # 1 − u drowns in any noise at all: the step's sign is what is left
                return delta, torch.full_like(delta, float(delta.square().mean().sqrt()))
            return undo_adam(delta, end, self.adam_rate)
        return delta, (rounding_noise(delta, end).square() + added**2).sqrt()


@dataclass(frozen=True, slots=True)
class SpanTest:
    """Tells whether an input of `layer` can be behind an update: `factor` · x, or x itself, must lie in `space`."""

    layer: str
    factor: torch.Tensor | None
    space: RowSpace

    def measure(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The distances `(…,)` of the inputs `(…, in)` from the space."""
        values = inputs[self.layer]
        return measure_distance(values if self.factor is None else values @ self.factor.T, self.space)


def build_tests(update: ObservedUpdate, factors: Sequence[LoraFactors]) -> list[SpanTest]:
    """The tests that the factors of layers with the same input allow: none where the inputs were more than the rank tells apart.

    dB of each layer is one, and dA of all of them together is one, since its rows lie in the same span.
    """
    tests, rows, noises = [], [], []
    layer = factors[0].module  # whose inputs are read for all of them
    for target in factors:
        if target.key_b in update.delta:
            space = find_row_space(*update.read_factor(target.key_b))
            if len(space.basis) and not space.full:
                tests.append(SpanTest(layer, update.start[target.key_a].float(), space))
        if target.key_a in update.delta:
            matrix, noise = update.read_factor(target.key_a)
            rows.append(matrix)
            noises.append(noise)
    if rows:
        space = find_row_space(torch.cat(rows), torch.cat(noises))
        if len(space.basis) and not space.full:
            tests.append(SpanTest(layer, None, space))
    return tests


def measure_all(tests: Sequence[SpanTest], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The least distance by any test: no layer sees every token (a first token's query has no gradient)."""
    return torch.stack([test.measure(inputs) for test in tests]).amin(0)


def find_near_limit(distances: torch.Tensor) -> float:
    """The largest of many distances that stands out below the others; −1 where none does."""
    near = distances[distances <= NEAR * distances.median()]
    return float(near.max()) if len(near) else -1.0
