# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What server and clients must agree on before a sum, each from its own options."""

import hashlib
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from ...wire.encoding import encode_message
from ...wire.messages import ClientTask
from ..noise_shares import NoiseShares


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
        task: Digest of what all members were given to do ([`digest_task`]).
        max_norm: Norm above which a client refuses to send its update, or None.
        noise: What members add before they mask, or None. Then `bound` is the norm to which they clip.
        least: Members below which a client refuses to take part.
    """

    federation_id: str
    round: int
    bound: float
    share: float
    size: int
    task: str
    max_norm: float | None = None
    noise: NoiseShares | None = None
    least: int = LEAST_MEMBERS

    def threshold(self, members: int) -> int:
        """Members whose shares open the sum: ⌊share·members⌋ + 1."""
        return compute_threshold(self.share, members)

    def levels(self, members: int) -> int:
        """Steps of the fixed point from 0 to the bound: the sum of all members stays within 2^30. With noise they are fewer."""
        return (1 << SUM_BITS) // members if self.noise is None else self.noise.levels

    def largest(self, members: int) -> int:
        """The largest magnitude of a member's value, in steps, with its noise."""
        return self.levels(members) if self.noise is None else self.noise.largest_summand(self.threshold(members))

    def resolution(self, members: int) -> float:
        """The step of the fixed point. A member's rounding error, and so the mean's, is at most half of it."""
        return self.bound / self.levels(members)


def compute_threshold(share: float, members: int) -> int:
    """⌊share·members⌋ + 1, with 2/3 as the fraction that it is meant to be."""
    return math.floor(Fraction(share).limit_denominator(1000) * members) + 1


def make_terms(options: Any, task: ClientTask, size: int) -> SumTerms:
    """The terms of a round, by one's own options.

    Args:
        options: A [`FederatedConfig`].
        task: Any task of the round.
        size: Values of an update.

    Raises:
        ValueError: if the task leaves noise to the clients, and its numbers are out of range, or the options have no clip.
    """
    asked = task.options
    if asked.share_noise:
        if options.clip_update_norm is None:
            raise ValueError(
                "The task leaves noise to the clients, and this client's options have no clip_update_norm to measure it by. Set "
                "the server's."
            )
        noise = NoiseShares(asked.share_noise, asked.share_colluders, size)
        return SumTerms(
            task.federation_id,
            task.round,
            float(options.clip_update_norm),
            options.secure_threshold,
            size,
            digest_task(task),
            noise=noise,
        )
    bound = float(options.clip_update_norm or options.max_update_norm)
    share, most = options.secure_threshold, options.max_update_norm
    return SumTerms(task.federation_id, task.round, bound, share, size, digest_task(task), most)


def digest_task(task: ClientTask) -> str:
    """SHA-256 of what the tasks of a round have in common: the proxy, the base and how to train.

    All keys of a sum are bound to it. A server could else give all members but one a model that has nothing to learn, and the
    sum would be that one's update ("Eluding Secure Aggregation in Federated Learning via Model Inconsistency", arXiv
    2111.07380).
    """
    header = {"options": asdict(task.options), "base": task.base_fingerprint, "rounds": task.num_rounds}
    header["broadcast"] = task.proxy is not None
    return hashlib.sha256(encode_message("task's digest", header, task.proxy or {})).hexdigest()
