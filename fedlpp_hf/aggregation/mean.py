# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The weighted mean of updates, in double precision, client by client in a fixed order."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch

from ..tensors.adapters import check_keys
from ..tensors.files import Read, find_values


# Updates that are read side by side: the sum in double precision goes through memory once for all of them.
_GROUP = 32
# Values that are summed at a time: with 20 bytes for each, all arithmetic is in the processor's second cache.
_CHUNK = 2**15

Update = Mapping[str, torch.Tensor]


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


def average_updates(updates: Iterable[Update], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The weighted mean of `updates`, tensor by tensor, float32: Δ̄ = Σ p_i Δ_i (FedAvg, arXiv 1602.05629).

    With updates that are [`TensorFile`]s memory is flat in their number: the sum in double precision, and 32 updates' views
    of one tensor. Give them in a fixed order of clients: sums are rounded, and the order of
    arrival must not show in the result.

    Raises:
        ValueError: if updates differ in keys or shapes, or the weights fit neither their number nor [`normalize_weights`].
    """
    return sum_updates(updates, normalize_weights(weights))


def sum_updates(
    updates: Iterable[Update],
    factors: Sequence[float],
    keys: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Σ f_i Δ_i, tensor by tensor, of all tensors or of those named by `keys`; the rest is as in [`average_updates`].

    Args:
        updates: Of the clients, in a fixed order.
        factors: f_i.
        keys: Of the tensors to add up.
        dtype: Of the result; the sum is float64 in any case.

    Raises:
        ValueError: if updates differ in keys or shapes, or are not as many as `factors`.
    """
    iterator, done = iter(updates), 0
    shapes: dict[str, torch.Size] = {}
    sums: dict[str, torch.Tensor] = {}  # flat
    memory = memoryview(bytearray(8 * _CHUNK))
    buffers = torch.empty(2, _CHUNK, dtype=torch.float64)  # once: new memory costs a fault for every page
    while group := list(islice(iterator, _GROUP)):
        names = list(keys or shapes or group[0])
        for place, update in enumerate(group, done):
            if keys is None:
                check_keys(update, names, f"update of client {place}")
        group_factors = factors[done : done + len(group)]
        first, done = done, done + len(group)
        if done > len(factors):
            break
        for key in names:
            terms = []
            for place, (factor, update) in enumerate(zip(group_factors, group, strict=True), first):
                shape, read = find_values(update, key, memory)
                _check_shape(key, shape, shapes.setdefault(key, shape), place)
                terms.append((factor, read))
            # The last group's sum is the result; the others' takes the place of the one before it, since new tensors for
            # each group leave the heap in pieces that the next ones don't fit, 150 MB of them each time.
            total, last = sums.get(key), done == len(factors)
            if last or total is None:
                result = torch.empty(shapes[key].numel(), dtype=dtype if last else torch.float64)
            else:
                result = total
            _add_weighted_(result, total, terms, buffers)
            sums[key] = result
    if done != len(factors):
        raise ValueError(f"{len(factors)} weights, but {'more' if done > len(factors) else done} updates.")
    return {key: sums[key].view(shape) for key, shape in shapes.items()}


@torch.no_grad()
def _add_weighted_(
    result: torch.Tensor, total: torch.Tensor | None, terms: Sequence[tuple[float, Read]], buffers: torch.Tensor
) -> None:
    """Set `result` `(n,)` to `total`, which it may be itself, or 0, + Σ f_i·tensor_i in double precision, rounded once."""
    for start in range(0, len(result), _CHUNK):
        end = min(start + _CHUNK, len(result))
        piece, values = buffers[:, : end - start]
        piece.zero_() if total is None else piece.copy_(total[start:end])
        for factor, read in terms:
            # To add float32 to float64 at once would make a new tensor each time, and take twice as long.
            piece.add_(values.copy_(read(start, end)), alpha=factor)
        result[start:end] = piece


def _check_shape(key: str, shape: torch.Size, expected: torch.Size, place: int) -> None:
    if shape != expected:
        raise ValueError(
            f"`{key}` of client {place} has shape {tuple(shape)}; expected {tuple(expected)}. Are both adapters of "
            "the same rank?"
        )
