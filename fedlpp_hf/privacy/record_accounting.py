# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What DP-SGD spends of a client's budget, run after run, by the accountants of Google's dp-accounting. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..config.extras import install_command


# Noise multiplier, sampling rate and number of steps of runs, one after the other.
Spending = Sequence[tuple[float, float, int]]

_ORDERS = [*range(2, 64), 128, 256, 512]  # of Rényi divergences, for a first bound; fractional ones converge slowly
_GRID = 1e-3  # of privacy losses; ε is then at most some 3e-4 above that of a grid ten times as fine
_TOLERANCE = 1e-3  # of a solved noise multiplier, relative


@dataclass(frozen=True, slots=True)
class RecordBudget:
    """What any row of a client may be exposed to.

    Args:
        epsilon: ε of all rounds together.
        delta: δ beside it.
        clip: Norm to which each row's gradient is scaled down.
        rounds: Rounds that the budget has to last for.
    """

    epsilon: float
    delta: float
    clip: float
    rounds: int


def compute_record_epsilon(spending: Spending, delta: float) -> float:
    """ε at `delta` of all of `spending` together; an upper bound.

    Each step is the Poisson-sampled Gaussian mechanism under adding or removing one row; their privacy loss distributions are
    composed (arXiv 2207.04380), and Rényi DP bounds the result where that is less.

    Raises:
        ValueError: for numbers out of range, or without dp-accounting.
    """
    merged: dict[tuple[float, float], int] = {}
    for noise, rate, steps in spending:
        if not (noise > 0 and 0 < rate <= 1 and steps >= 0 and 0 < delta < 1):
            raise ValueError(
                f"noise multiplier {noise}, rate {rate}, {steps} steps, delta {delta}; expected a positive number, a share, a "
                "number of steps, and a number between 0 and 1."
            )
        merged[noise, rate] = merged.get((noise, rate), 0) + steps
    left = tuple((noise, rate, steps) for (noise, rate), steps in sorted(merged.items()) if steps)
    return _compute_epsilon(left, delta) if left else 0.0


def solve_record_noise(budget: RecordBudget, rate: float, steps: int) -> float:
    """The least noise multiplier with which `rounds` runs of `steps` steps stay within the budget, at most 0.1 % too large.

    Raises:
        ValueError: if no noise up to 2²⁰ is enough, or without dp-accounting.
    """
    return _solve_noise(budget.epsilon, budget.delta, rate, budget.rounds * steps)


@lru_cache(maxsize=64)
def _solve_noise(epsilon: float, delta: float, rate: float, steps: int) -> float:
    low, high = 0.25, 0.5
    while compute_record_epsilon([(high, rate, steps)], delta) > epsilon:
        low, high = high, 2 * high
        if high > 2**20:
            raise ValueError(f"No noise makes {steps} steps spend less than ε = {epsilon} at δ = {delta}.")
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if compute_record_epsilon([(middle, rate, steps)], delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=4096)
def _compute_epsilon(spending: tuple[tuple[float, float, int], ...], delta: float) -> float:
    try:
        import dp_accounting as dp  # half a second, and an extra
    except ImportError:
        raise ValueError(f"Differential privacy needs dp-accounting: {install_command('privacy')}") from None

    def spend(accountant: "dp.PrivacyAccountant") -> float:
        for noise, rate, steps in spending:
            accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps)
        return float(accountant.get_epsilon(delta))

    bound = spend(dp.rdp.RdpAccountant(_ORDERS))
    if not bound < 1000:
        return bound  # the grid of such losses would not fit in memory, and the number protects nothing
    return min(bound, spend(dp.pld.PLDAccountant(value_discretization_interval=_GRID * max(1.0, bound / 10))))
