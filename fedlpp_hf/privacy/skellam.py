# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Skellam noise, the difference of two Poisson numbers, from the operating system's cryptographic randomness. There is no seed.

Skellam numbers of the variances μ₁ and μ₂ add up to one of μ₁ + μ₂, so several clients can each add a part of the noise of a sum.
`Sk(μ)` has the **variance** μ here, as in arXiv 2110.04995 (Definition 3.1): P(k) = e^(−μ)·I_|k|(μ), the difference of two
Poisson numbers of mean μ/2. Elsewhere, SciPy included, μ is the mean of both, and the variance 2μ.

Numbers are drawn from a table of the distribution: exact integers, no floating point. A sampler of Poisson numbers would need one
of its own for each value, which takes minutes for a million values in Python; a search in a table takes 0.3 s.
"""

import math
import secrets
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .noise import ReadBytes


# Bits of a probability: with 64, what is rounded off, times values, clients and e^ε, could come near a δ of 10⁻⁶.
_BITS = 128
_WORD = 64
_START = 1 << 160  # of the recurrence, so that rounding it down to integers costs less than the table holds
_SCALE = 1 << 32  # a variance is a multiple of 1/2³², rounded up
LARGEST_STD = 1 << 14  # of a table: 430,000 entries, made in half a second
# Total variation between a number from a table and a Skellam number: 2¹⁹ entries, each less than 2⁻¹²⁸ off, and the two tails.
SAMPLING_DISTANCE = 2.0**-109
_CHUNK = 1 << 18  # values at a time, so that memory stays small


@dataclass(frozen=True, eq=False)
class SkellamTable:
    """P(X ≤ k) in units of 2⁻¹²⁸ for k = −reach … reach − 1: the upper and the lower 64 bits, `(2·reach,)` uint64 each."""

    reach: int
    upper: np.ndarray
    lower: np.ndarray


def draw_skellam(variance: float, count: int, read_bytes: ReadBytes = secrets.token_bytes) -> np.ndarray:
    """`(count,)` independent Skellam numbers of that variance, int64.

    Raises:
        ValueError: if the variance is not above 0, or above 2²⁸.
    """
    table = make_table(variance)
    values = np.empty(count, np.int64)
    for start in range(0, count, _CHUNK):
        length = min(_CHUNK, count - start)
        words = np.frombuffer(read_bytes(8 * length), "<u8")
        places = np.searchsorted(table.upper, words, side="left")
        # A uniform number of 128 bits; its lower half only decides where the upper one is that of an entry.
        for place in np.flatnonzero(table.upper[np.minimum(places, len(table.upper) - 1)] == words):
            end = int(np.searchsorted(table.upper, words[place], side="right"))
            low = np.frombuffer(read_bytes(8), "<u8")[0]
            places[place] += int((table.lower[places[place] : end] <= low).sum())
        values[start : start + length] = places
    return values - table.reach


def find_reach(variance: float) -> int:
    """The largest magnitude that is drawn: above it, each tail has less than 2⁻¹²⁸.

    Chernoff's bound with E[e^(tX)] = e^(μ(cosh t − 1)): P(X ≥ x) ≤ exp(√(μ² + x²) − μ − x·asinh(x/μ)).
    """

    def bound(x: int) -> float:
        return math.hypot(variance, x) - variance - x * math.asinh(x / variance)

    low, high = 0, 1
    while bound(high) > -_BITS * math.log(2):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bound(middle) > -_BITS * math.log(2) else (low, middle)
    return high


def make_table(variance: float) -> SkellamTable:
    """The distribution of one number.

    Raises:
        ValueError: as [`draw_skellam`].
    """
    if not 0 < variance <= LARGEST_STD**2 * (1 + 1e-6):
        raise ValueError(f"A Skellam variance of {variance}; expected a number above 0, and up to {LARGEST_STD}².")
    return _make_table(math.ceil(variance * _SCALE))


@lru_cache(maxsize=4)
def _make_table(scaled: int) -> SkellamTable:
    """By Miller's recurrence, I_(k−1) = I_(k+1) + (2k/μ)·I_k (DLMF 10.29.1), which is stable downwards: all terms are positive,
    and errors shrink against what is added. Dividing by the sum of all gives probabilities without any exponential.
    """
    reach = find_reach(scaled / _SCALE)
    terms = [0] * (reach + 2)
    terms[reach] = _START
    for k in range(reach, 0, -1):
        terms[k - 1] = terms[k + 1] + 2 * k * terms[k] * _SCALE // scaled
    total, below = terms[0] + 2 * sum(terms[1:]), 0
    upper, lower = np.empty(2 * reach, np.uint64), np.empty(2 * reach, np.uint64)
    for place in range(2 * reach):
        below += terms[abs(place - reach)]
        upper[place], lower[place] = divmod((below << _BITS) // total, 1 << _WORD)
    upper.setflags(write=False)
    lower.setflags(write=False)
    return SkellamTable(reach, upper, lower)
