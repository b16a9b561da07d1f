# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What server and clients must agree on before a sum, each from its own options."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


LEAST_MEMBERS = 3  # of two, each would learn the other's update
MOST_MEMBERS = 1000  # Shamir's shares are made one by one: time grows with the square of the members
# Sums are taken modulo 2^32 and stay within 2^30: a sum that was not unmasked is uniform and shows.
WORD_BITS, SUM_BITS = 32, 30


@dataclass(frozen=True, slots=True)
class SumTerms:
    """The terms of one round's sum.

    Args:
        federation_id, round: Of the tasks.
        bound: Largest magnitude that a value of an update may have.
        share: Share of a round's members above which shares of them open the sum, from 1/2 to below 1.
        size: Values of an update.
        max_norm: Norm above which a client refuses to send its update, or None.
    """

    federation_id: str
    round: int
    bound: float
    share: float
    size: int
    max_norm: float | None = None

    def threshold(self, members: int) -> int:
        """Members whose shares open the sum: ⌊share·members⌋ + 1."""
        return compute_threshold(self.share, members)

    @staticmethod
    def levels(members: int) -> int:
        """Steps of the fixed point from 0 to the bound: the sum of all members stays within 2^30."""
        return (1 << SUM_BITS) // members

    def resolution(self, members: int) -> float:
        """The step of the fixed point. A member's rounding error, and so the mean's, is at most half of it."""
        return self.bound / self.levels(members)


def compute_threshold(share: float, members: int) -> int:
    """⌊share·members⌋ + 1, with 2/3 as the fraction that it is meant to be."""
    return math.floor(Fraction(share).limit_denominator(1000) * members) + 1


def make_terms(options: Any, federation_id: str, number: int, size: int) -> SumTerms:
    """The terms of a round, by one's own options.

    Args:
        options: A [`FederatedConfig`].
        federation_id: Of the federation.
        number: Of the round.
        size: Values of an update.
    """
    bound = options.clip_update_norm or options.max_update_norm
    return SumTerms(federation_id, number, float(bound), options.secure_threshold, size, options.max_update_norm)
