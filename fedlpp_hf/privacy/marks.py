# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Marks that tell copies of a quantized model apart: what is drawn for each client, and how a suspect is scored.

A weight that lies nearly halfway between two levels may be rounded to either at no cost. In each client's copy, chance
decides, drawn from the owner's secret: without it the marked weights can't be told from the others, and one copy says nothing
about another. The code is Tardos' (J. ACM 55:2, 2008) with the symmetric score of Škorić et al. (arXiv cs/0610131): it stands
against coalitions that compare their copies. Pure functions.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


_STEPS = 1 << 16  # chances are multiples of this, two bytes each
_CUTOFF = 0.05  # the bias of a position stays this far from 0 and 1, which bounds what one position adds to a score


@dataclass(frozen=True, slots=True)
class Mark:
    """Whose copy a base is: the owner's `secret` (at least 16 bytes) and the `client`'s id."""

    secret: bytes
    client: str


def draw_biases(secret: bytes, name: str, count: int) -> np.ndarray:
    """The chance that a position of the tensor `name` is rounded up, `(count,)` float64 in [0.05, 0.95].

    Tardos' density: p = sin²(r) with r uniform (J. ACM 55:2, §2), cut off at both ends.
    """
    low = math.asin(math.sqrt(_CUTOFF))
    angles = low + (math.pi / 2 - 2 * low) * _draw(secret, "bias", name, count)
    return np.sin(angles) ** 2


def draw_choices(mark: Mark, name: str, count: int) -> np.ndarray:
    """Whether each position of the tensor `name` is rounded up in the client's copy, `(count,)` bool."""
    return _draw(mark.secret, f"client {mark.client}", name, count) < draw_biases(mark.secret, name, count)


def _draw(secret: bytes, purpose: str, name: str, count: int) -> np.ndarray:
    """`count` numbers in (0, 1): SHAKE-256 (FIPS 202) of the secret, which comes first, the purpose and the name."""
    digest = hashlib.shake_256(secret + f"{len(purpose)} {purpose} {name}".encode()).digest(2 * count)
    return (np.frombuffer(digest, "<u2") + 0.5) / _STEPS


@dataclass(frozen=True, slots=True)
class Trace:
    """How far a suspect is one client's copy.

    Args:
        client: The client's id.
        score: The sum over positions, in standard deviations of an innocent copy's.
        false_alarm: Bound on the chance that an innocent client of the federation has such a score, all clients together.
        correlation: 1 for the client's own copy as it is, 0 for an innocent one.
    """

    client: str
    score: float
    false_alarm: float
    correlation: float


class Tracer:
    """Adds up, tensor by tensor, how a suspect's marked positions agree with each client's copy."""

    def __init__(self, secret: bytes, clients: Sequence[str]):
        self.marks = [Mark(secret, client) for client in clients]
        self.secret = secret
        self.sums = np.zeros(len(self.marks))
        self.own = np.zeros(len(self.marks))
        self.variance = 0.0
        self.positions = 0

    def add(self, name: str, values: np.ndarray, marked: np.ndarray | None = None) -> None:
        """Take the marked positions of one tensor.

        Args:
            name: Of the tensor.
            values: `(n,)`, where the suspect stands: 1 at the upper level, −1 at the lower, 0 halfway.
            marked: Which of the positions that something is drawn for are marked, bool, n of them; all by default.
        """
        if not len(values):
            return
        marked = np.ones(len(values), bool) if marked is None else marked
        biases = draw_biases(self.secret, name, len(marked))[marked]
        up, down = np.sqrt((1 - biases) / biases), -np.sqrt(biases / (1 - biases))
        for place, mark in enumerate(self.marks):
            weights = np.where(draw_choices(mark, name, len(marked))[marked], up, down)
            self.sums[place] += float(values @ weights)
            self.own[place] += float(np.abs(weights).sum())
        # Given the suspect, an innocent client's choices are independent, with mean 0 and variance 1 in these weights.
        self.variance += float(values @ values)
        self.positions += len(values)

    def results(self) -> Iterator[Trace]:
        """What was found for each client, the likeliest first."""
        found = []
        for mark, total, own in zip(self.marks, self.sums, self.own, strict=True):
            score = total / math.sqrt(self.variance) if self.variance else 0.0
            bound = bound_false_alarm(total, self.variance)
            found.append(Trace(mark.client, score, min(1.0, bound * len(self.marks)), total / own if own else 0.0))
        yield from sorted(found, key=lambda trace: -trace.score)


def bound_false_alarm(total: float, variance: float) -> float:
    """A bound on the chance that an innocent client's sum reaches `total`.

    Bernstein's inequality for independent terms with mean 0, of at most b = √((1 − c)/c), c being the cutoff, and variances
    that add up to `variance`: exp(−t²/2 / (v + b·t/3)).
    """
    if total <= 0 or not variance:
        return 1.0
    largest = math.sqrt((1 - _CUTOFF) / _CUTOFF)
    return math.exp(-(total**2) / 2 / (variance + largest * total / 3))
