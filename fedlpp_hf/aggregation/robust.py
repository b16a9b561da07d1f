# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Robust aggregation: means that some of the clients can't move where they like. Pure functions.

Multi-Krum needs only the inner products of the updates: it turns the Gram matrix into weights, and the mean with these
weights is [`average_updates`]. The trimmed mean and the median work coordinate by coordinate. All read a few megabytes of
every update at a time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..tensors.files import find_values


_CHUNK_VALUES = 2**22  # of all updates together: 32 MiB in double precision

Updates = Sequence[Mapping[str, torch.Tensor]]


def _chunks(updates: Updates, key: str) -> Iterator[torch.Tensor]:
    """`(clients, n)` float64 pieces of one tensor of all updates, in memory order."""
    shapes, readers = zip(*(find_values(update, key) for update in updates), strict=True)
    for place, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(f"`{key}` of client {place} has shape {tuple(shape)}; expected {tuple(shapes[0])}.")
    count, step = shapes[0].numel(), max(_CHUNK_VALUES // len(updates), 1)
    for start in range(0, count, step):
        yield torch.stack([read(start, min(start + step, count)).double() for read in readers])


def gram_matrix(updates: Updates) -> torch.Tensor:
    """Inner products of all pairs of updates, `(clients, clients)` float64."""
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for key in sorted(updates[0]):
        for rows in _chunks(updates, key):
            gram += rows @ rows.T
    return gram


def krum_weights(gram: torch.Tensor, num_attackers: int, num_selected: int) -> list[float]:
    """Equal weights for the `num_selected` updates with the lowest Krum scores, 0 for the others (multi-Krum).

    The score of an update is the sum of its squared distances to its n − f − 2 nearest neighbours (Blanchard et al., arXiv
    1703.02757, §4). Withstands f attackers among n ≥ 2f + 3 clients.

    Raises:
        ValueError: if there are fewer clients than that, or fewer than `num_selected` honest ones.
    """
    count = len(gram)
    if num_attackers < 0 or count < 2 * num_attackers + 3:
        raise ValueError(
            f"Krum against {num_attackers} attackers needs {2 * num_attackers + 3} updates; there are {count}. Raise "
            "`clients_per_round` or lower `num_attackers`."
        )
    if not 1 <= num_selected <= count - num_attackers:
        raise ValueError(f"Krum can select 1 to {count - num_attackers} of {count} updates, not {num_selected}.")
    norms = gram.diagonal()
    distances = (norms[:, None] + norms - 2 * gram).clamp(min=0)
    distances.fill_diagonal_(math.inf)
    scores = distances.sort(1).values[:, : count - num_attackers - 2].sum(1)
    selected = scores.argsort(stable=True)[:num_selected].tolist()
    return [float(place in selected) for place in range(count)]


def trimmed_mean(updates: Updates, num_attackers: int) -> dict[str, torch.Tensor]:
    """The mean of every coordinate without its `num_attackers` largest and smallest values (arXiv 1803.01498).

    Withstands f attackers among n > 2f clients.

    Raises:
        ValueError: if there are no more than 2f updates.
    """
    count = len(updates)
    if num_attackers < 0 or count <= 2 * num_attackers:
        raise ValueError(
            f"A mean trimmed by {num_attackers} on both sides needs {2 * num_attackers + 1} updates; there are {count}. "
            "Raise `clients_per_round` or lower `num_attackers`."
        )
    means = {}
    for key in updates[0]:
        pieces = [
            rows.sort(0).values[num_attackers : count - num_attackers].mean(0).float()
            for rows in _chunks(updates, key)
        ]
        means[key] = torch.cat(pieces).view(find_values(updates[0], key)[0])
    return means


def coordinate_median(updates: Updates) -> dict[str, torch.Tensor]:
    """The median of every coordinate, the mean of the middle two if there is no middle one (arXiv 1803.01498).

    Withstands f attackers among n > 2f clients.
    """
    return trimmed_mean(updates, (len(updates) - 1) // 2)
