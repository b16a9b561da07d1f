# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What rounds with noise spend of a privacy budget, by the accountants of Google's dp-accounting. Pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


_TOLERANCE = 1e-3  # of a solved noise multiplier, relative
_ORDERS = [*range(2, 64), 128, 256, 512]  # of Rényi divergences, for a first bound; fractional ones converge slowly
# Of privacy losses, as a part of a first bound: five digits of ε are those of a finer grid, and it fits in memory.
_GRID = 3e-4


@dataclass(frozen=True, slots=True)
class ClientSampling:
    """How the clients of a round are drawn, in secret.

    Args:
        kind: `poisson` (each client by itself) or `fixed` (so many, uniform without replacement).
        clients: All clients, N. Their number is public.
        per_round: Clients in a round; with `poisson` on average.
    """

    kind: str
    clients: int
    per_round: int

    @property
    def rate(self) -> float:
        """The chance of a client to be in a round, q."""
        return self.per_round / self.clients

    def describe(self) -> str:
        """The analysis behind [`compute_epsilon`], for reports."""
        if self.kind == "poisson":
            return f"Poisson sampling at rate {self.rate:.4g}; PLD accountant; against adding or removing one client's whole data"
        return (
            f"{self.per_round} of {self.clients} clients in each round; RDP accountant, twice the sensitivity; against "
            "replacing one client's whole data"
        )


def compute_epsilon(noise_multiplier: float, sampling: ClientSampling, releases: int, delta: float) -> float:
    """ε at `delta` of so many noisy sums of clients' clipped updates; an upper bound, infinite if there is none.

    `poisson`: the privacy loss distribution of the Poisson-sampled Gaussian mechanism under adding or removing one client
    (arXiv 2207.04380). `fixed`: Rényi DP of the Gaussian mechanism sampled without replacement under replacing one client
    (arXiv 1808.00087, Theorem 27), or without the gain by sampling where that is less. One client replaced moves the sum by
    up to two clips, so the noise counts half.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum divided by the clip: of all noise that is in the sum,
            whoever added it.
        sampling: Of clients.
        releases: Sums that were drawn, each with clients and noise of its own.
        delta: δ.

    Raises:
        ValueError: for arguments out of range.
    """
    if not noise_multiplier > 0 or releases < 0 or not 0 < delta < 1:
        raise ValueError(
            f"noise_multiplier={noise_multiplier}, releases={releases}, delta={delta}; expected a positive number, 0 or more, "
            "and a number between 0 and 1."
        )
    if not 1 <= sampling.per_round <= sampling.clients:
        raise ValueError(f"{sampling.per_round} of {sampling.clients} clients in a round; expected 1 to all of them.")
    return _compute_epsilon(noise_multiplier, sampling, releases, delta) if releases else 0.0


def solve_noise(target_epsilon: float, delta: float, sampling: ClientSampling, releases: int) -> float:
    """The least noise multiplier with which so many releases spend no more than `target_epsilon`; never too small, and at most
    0.1 % too large. Of more than 0.1 nothing is needed where ε is that large.

    Raises:
        ValueError: as [`compute_epsilon`], or if no noise up to 2²⁰ is enough.
    """

    def spend(noise: float) -> float:
        return compute_epsilon(noise, sampling, releases, delta)

    return solve_multiplier(target_epsilon, spend, f"{releases} rounds", delta)


def solve_multiplier(target_epsilon: float, spend: Callable[[float], float], what: str, delta: float) -> float:
    """The least noise multiplier with which `spend` of it is no more than `target_epsilon`, as [`solve_noise`].

    Args:
        target_epsilon: ε.
        spend: ε of a noise multiplier.
        what: It is spent on, for the message.
        delta: The same.

    Raises:
        ValueError: if no noise up to 2²⁰ is enough.
    """
    low, high = 0.5, 1.0
    while spend(high) > target_epsilon:
        low, high = high, 2 * high
        if high > 2**20:
            raise ValueError(f"No noise makes {what} spend less than ε = {target_epsilon} at δ = {delta}.")
    while low >= 0.1 and spend(low) <= target_epsilon:
        low, high = low / 2, low
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if spend(middle) > target_epsilon:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=4096)
def _compute_epsilon(noise_multiplier: float, sampling: ClientSampling, releases: int, delta: float) -> float:
    import dp_accounting as dp  # half a second, and an extra

    if sampling.kind == "fixed":
        gaussian = dp.GaussianDpEvent(noise_multiplier / 2)
        events = [gaussian, dp.SampledWithoutReplacementDpEvent(sampling.clients, sampling.per_round, gaussian)]
        replace = dp.NeighboringRelation.REPLACE_ONE
        accountants = [dp.rdp.RdpAccountant(neighboring_relation=replace) for _ in events]
        return min(
            _spend(accountant, event, releases, delta) for accountant, event in zip(accountants, events, strict=True)
        )
    event = dp.PoissonSampledDpEvent(sampling.rate, dp.GaussianDpEvent(noise_multiplier))
    bound = _spend(dp.rdp.RdpAccountant(_ORDERS), event, releases, delta)
    if bound == float("inf"):
        return bound
    accountant = dp.pld.PLDAccountant(value_discretization_interval=_GRID * bound)
    return min(bound, _spend(accountant, event, releases, delta))


def _spend(accountant: Any, event: Any, releases: int, delta: float) -> float:
    return float(accountant.compose(event, releases).get_epsilon(delta))
