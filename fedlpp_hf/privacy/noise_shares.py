# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Noise that clients add to a secure sum in shares, so that the server gets the sum with noise alone; and its ε.

The distributed Skellam mechanism of arXiv 2110.04995: each client clips its update, rounds it to integers, and adds its share of
the noise before it masks. Pure functions.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..config.client_dp import LARGEST_SHARED_NOISE
from ..config.extras import install_command
from .noise import ReadBytes
from .skellam import LARGEST_STD, SAMPLING_DISTANCE, draw_skellam, find_reach


_LEAST_NOISE = 0.05
_FEWEST_LEVELS = 1024
_LEVELS_PER_ROOT = 8  # levels for each √values: rounding then takes 1/1500 of an update's length
_MARGIN = 1 - 2.0**-12  # with which an update is shortened that rounding has made too long
_MOST_SUMMANDS = 1024  # in a sum
_ORDERS = [
    *range(2, 257),
    *(round(256 * 2 ** (step / 4)) for step in range(1, 25)),
]  # integers: the bound is for these alone


@dataclass(frozen=True, slots=True)
class NoiseShares:
    """The noise of one sum.

    Args:
        multiplier: Standard deviation of the noise that counts, in clips, z: that of the least sum which is opened, without the
            noise of `colluders`.
        colluders: Clients that may tell the server their noise, or add none.
        values: Of an update.

    Raises:
        ValueError: for numbers out of range: they come from the server's task.
    """

    multiplier: float
    colluders: int
    values: int

    def __post_init__(self) -> None:
        if not (_LEAST_NOISE <= self.multiplier <= LARGEST_SHARED_NOISE and self.colluders >= 0 and self.values > 0):
            raise ValueError(
                f"Noise in shares with the multiplier {self.multiplier}, {self.colluders} colluders and {self.values} values; "
                f"expected {_LEAST_NOISE} to {LARGEST_SHARED_NOISE:g}, 0 or more, and 1 or more."
            )

    @property
    def levels(self) -> int:
        """Steps of the fixed point in a clip: many for many values, but a share's table must stay small."""
        wanted = max(_FEWEST_LEVELS, math.ceil(_LEVELS_PER_ROOT * math.sqrt(self.values)))
        return min(wanted, int(LARGEST_STD / self.multiplier))

    @property
    def variance(self) -> float:
        """Of the noise that counts, in steps of the fixed point, squared: μ = (z·levels)²."""
        return (self.multiplier * self.levels) ** 2

    def share_variance(self, threshold: int) -> float:
        """That of one client's share: any `threshold` clients without the colluders add up to [`variance`], more to more.

        Args:
            threshold: Clients whose updates a sum has at least.

        Raises:
            ValueError: if nobody is left.
        """
        if threshold <= self.colluders:
            raise ValueError(
                f"a sum may be opened with {threshold} clients, and {self.colluders} may collude: nobody's noise would count. Lower "
                "colluding_clients, raise secure_threshold, or have more clients in a round"
            )
        return self.variance / (threshold - self.colluders)

    def largest_summand(self, threshold: int) -> int:
        """The largest magnitude of a client's value with its noise. Of 1,000 clients the sum stays below 2³⁰: nothing overflows."""
        return self.levels + find_reach(self.share_variance(threshold))

    def encode(
        self, values: np.ndarray, clip: float, threshold: int, read_bytes: ReadBytes = secrets.token_bytes
    ) -> np.ndarray:
        """A client's summand `(values,)`, int64: its update clipped, as integers, with its share of the noise.

        Args:
            values: The update, finite.
            clip: Norm that it may have.
            threshold: Clients whose updates the sum has at least.
            read_bytes: Source of randomness, for tests.
        """
        return round_within(values, clip, self.levels) + draw_skellam(
            self.share_variance(threshold), len(values), read_bytes
        )

    def describe(self) -> str:
        """The analysis behind [`compute_share_epsilon`], for reports."""
        return (
            f"noise added by the clients in shares, of which those of {self.colluders} do not count; Skellam RDP accountant, no gain "
            "by sampling; against replacing one client's whole data"
        )


def round_within(values: np.ndarray, clip: float, levels: int) -> np.ndarray:
    """`values` scaled down to the norm `clip` if they are longer, in steps of clip/levels, as the nearest integers, int64.

    The norm of the **integers** is at most `levels`, whatever rounding did: rounding to the nearest can add up to half a step in
    each value, √n/2 in all. What comes out too long is shortened and rounded again.
    """
    scaled = values.astype(np.float64) * (levels / clip)
    if (norm := float(np.linalg.norm(scaled))) > levels:
        scaled *= levels / norm
    while True:
        rounded = np.rint(scaled).astype(np.int64)
        square = int(rounded @ rounded)  # exact
        if square <= levels**2:
            return rounded
        scaled *= levels / math.sqrt(square) * _MARGIN


def bound_divergence(order: int, variance: float, longest: float, largest_sum: float) -> float:
    """Rényi divergence of the Skellam mechanism at an order, at most (arXiv 2110.04995, Corollary 3.6).

    ε(α) ≤ αΔ₂²/(2μ) + min(((2α − 1)Δ₂² + 6Δ₁)/(4μ²), 3Δ₁/(2μ)) for integers α > 1 and integer values.

    Args:
        order: α.
        variance: μ, of the noise on each value.
        longest: Δ₂, how far one client moves the sum, in the 2-norm.
        largest_sum: Δ₁, the same in the 1-norm.
    """
    square = longest**2
    rest = min(
        ((2 * order - 1) * square + 6 * largest_sum) / (4 * variance**2),
        3 * largest_sum / (2 * variance),
    )
    return order * square / (2 * variance) + rest


def compute_share_epsilon(sums: Mapping[NoiseShares, int], delta: float) -> float:
    """ε at `delta` of sums with noise in shares, so many of each kind; an upper bound, infinite if there is none.

    Who is in a sum is known, to the server above all, so there is no gain by sampling, and a client is replaced by another: that
    moves the integers by Δ₂ = 2·levels, and by Δ₁ ≤ min(√n·Δ₂, Δ₂²). A part of δ pays for the tables, which are not quite
    Skellam's: mechanisms at a total variation τ are (ε, δ + (1 + e^ε)τ)-private where the others are (ε, δ)-private.

    Raises:
        ValueError: for a δ out of range, or without dp-accounting.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}; expected a number between 0 and 1.")
    sums = {noise: count for noise, count in sums.items() if count}
    if not sums:
        return 0.0
    divergences = [sum(count * _bound_one(noise, order) for noise, count in sums.items()) for order in _ORDERS]
    first = _convert(divergences, delta)
    distance = _MOST_SUMMANDS * SAMPLING_DISTANCE * sum(noise.values * count for noise, count in sums.items())
    # At half of δ or more, ε is at most log 2 above the first.
    taken = distance * (1 + math.exp(min(first + 1, 700.0)))
    return _convert(divergences, delta - taken) if taken <= delta / 2 else math.inf


def _bound_one(noise: NoiseShares, order: int) -> float:
    longest = 2.0 * noise.levels
    return bound_divergence(order, noise.variance, longest, min(math.sqrt(noise.values) * longest, longest**2))


def _convert(divergences: list[float], delta: float) -> float:
    try:
        from dp_accounting import rdp  # half a second, and an extra
    except ImportError:
        raise ValueError(f"Differential privacy needs dp-accounting: {install_command('privacy')}") from None
    return float(rdp.compute_epsilon(_ORDERS, divergences, delta)[0])
