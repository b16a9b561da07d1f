# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""An empirical ε beside the accounted one, from canary clients in a single run (Andrew et al., arXiv 2302.03098).

A canary client sends a random direction as long as the clip allows. If it took part, the server's release has a larger component along
it. In d dimensions √d times the cosine of a release and a direction it knows nothing of is all but N(0, 1), so that one run with many
canaries shows how far theirs are from chance. The audit treats the mechanism as a black box: it sees what is released, nothing else.

Other than in the paper, the canaries are at right angles to each other, and each component is measured against what is left of the
release without all of them: so no canary is noise to the others, and the distribution under chance is the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from .data_report import CanaryAudit


_CONFIDENCE = 0.999  # of what refutes: an alarm by chance in one run of 2,000
_LARGEST = 1000.0  # an ε above it is no privacy


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a client sends: its update as one vector `(d,)`, and the number of examples that it claims."""

    update: np.ndarray
    num_examples: int = 1


# What the server publishes of a round's contributions: the noisy mean, `(d,)`. Called with the round's number, from 1.
Release = Callable[[int, Sequence[Contribution]], np.ndarray]


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """One audited run.

    Args:
        dimension: Values of an update.
        clip: The norm that the server clips to.
        num_canaries: Canary clients, fewer than `dimension`.
        num_rounds: Rounds.
        sampling_rate: Probability with which each canary takes part in a round: that of the federation's Poisson sampling.
        length: Norm of a canary's update in units of `clip`. Above 1, as a malicious client's is, it shows a clip that fails.
        num_examples: Examples that a canary claims. Above 1 it shows weights by examples beside noise for equal weights.
        seed: Of canaries and sampling, not of the mechanism's noise.
    """

    dimension: int
    clip: float
    num_canaries: int = 200
    num_rounds: int = 1
    sampling_rate: float = 1.0
    length: float = 1.0
    num_examples: int = 1
    seed: int = 0


def audit_canaries(
    release: Release,
    settings: CanarySettings,
    delta: float,
    accounted: float | None = None,
    others: Callable[[int], Sequence[Contribution]] = lambda number: (),
) -> CanaryAudit:
    """Run the rounds of a mechanism with canary clients, and estimate its ε from what it releases.

    Args:
        release: The mechanism, from updates to what the server publishes.
        settings: Canaries and rounds.
        delta: δ at which ε is given.
        accounted: The ε that the accountant claims for this run at `delta`.
        others: The other clients' contributions of a round; none by default. Zeros are the strongest attacker's view, who knows
            all of them: they only count as clients, and with their examples.

    Raises:
        ValueError: for settings out of range, or a release of another size.
    """
    _check_settings(settings, delta)
    generator = np.random.default_rng(settings.seed)
    canaries = np.linalg.qr(generator.standard_normal((settings.dimension, settings.num_canaries)))[0].T
    total = np.zeros(settings.dimension)
    for number in range(1, settings.num_rounds + 1):
        sampled = generator.random(settings.num_canaries) < settings.sampling_rate
        length = settings.length * settings.clip
        sent = [Contribution(length * canary, settings.num_examples) for canary in canaries[sampled]]
        released = np.asarray(release(number, [*sent, *others(number)]), np.float64)
        if released.shape != (settings.dimension,):
            raise ValueError(f"The release has shape {released.shape}; expected ({settings.dimension},).")
        total += released
    components = canaries @ total
    rest = float(np.linalg.norm(total - canaries.T @ components)) / math.sqrt(settings.dimension - len(canaries))
    same = others(1)
    once, again = (np.asarray(release(1, same), np.float64) for _ in range(2))
    repeats = bool(np.any(once) and np.array_equal(once, again))
    # Without any noise, or honest clients, there is nothing left: the components are then certain.
    return judge_canaries(
        components / max(rest, 1e-9 * float(np.abs(components).max()), 1e-300), delta, accounted, repeats
    )


def judge_canaries(
    statistics: np.ndarray, delta: float, accounted: float | None = None, repeats: bool = False
) -> CanaryAudit:
    """ε from the canaries' components in units of chance: each is N(0, 1) for a canary that did not take part."""
    shift, spread = float(statistics.mean()), float(statistics.std(ddof=1))
    margin = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) * spread / math.sqrt(len(statistics))
    return CanaryAudit(
        num_canaries=len(statistics),
        delta=delta,
        shift=shift,
        epsilon=gaussian_epsilon(shift, delta),
        epsilon_low=gaussian_epsilon(shift - margin, delta),
        epsilon_high=gaussian_epsilon(shift + margin, delta),
        bound=bound_epsilon(statistics, delta),
        accounted=accounted,
        repeats=repeats,
    )


def gaussian_epsilon(shift: float, delta: float) -> float:
    """ε at `delta` of N(`shift`, 1) against N(0, 1): δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (arXiv 1805.06530, Theorem 8)."""
    if shift <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        left, right = shift / 2 - epsilon / shift, -shift / 2 - epsilon / shift
        return math.exp(_log_normal(left)) - math.exp(min(epsilon + _log_normal(right), 0.0)) - delta

    return _find_root(excess, _LARGEST)


def bound_epsilon(statistics: np.ndarray, delta: float) -> float:
    """A lower bound of ε at 99.9 % confidence: ε ≥ log((TPR − δ) / FPR) for every threshold (Kairouz et al., arXiv 1311.0776).

    TPR is bounded from below by Clopper and Pearson on every second canary, at the threshold that is best on the others. FPR is the
    normal tail, which a cosine's own distribution stays below. Canaries of one run count as independent; they nearly are.
    """
    chosen_on, judged_on = np.sort(statistics[::2]), statistics[1::2]
    # Above the median too few would be left to be sure of.
    threshold = max(chosen_on[: len(chosen_on) // 2 + 1], key=lambda value: _log_ratio(chosen_on, value, delta))
    return max(0.0, min(_LARGEST, _log_ratio(judged_on, threshold, delta)))


def _log_ratio(statistics: np.ndarray, threshold: float, delta: float) -> float:
    above = int((statistics >= threshold).sum())
    low = bound_share(above, len(statistics))
    return math.log(low - delta) - _log_normal(-float(threshold)) if low > delta else -math.inf


def bound_share(count: int, total: int, confidence: float = _CONFIDENCE) -> float:
    """The least share with which `count` or more of `total` come about as often as 1 − `confidence` (Clopper and Pearson, 1934)."""
    ways = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(total + 1)]

    def lack(share: float) -> float:
        if not 0 < share < 1:
            return (1 - confidence) - (share >= 1)
        terms = (ways[k] + k * math.log(share) + (total - k) * math.log1p(-share) for k in range(count, total + 1))
        return (1 - confidence) - math.fsum(map(math.exp, terms))

    return _find_root(lack, 1.0) if count else 0.0


def _log_normal(value: float) -> float:
    """log Φ, also far out in the tail."""
    return float(torch.special.log_ndtr(torch.tensor(value, dtype=torch.float64)))


def _find_root(falling: Callable[[float], float], largest: float) -> float:
    """Where a function that falls from 0 to `largest` passes zero, or the end that is nearest."""
    low, high = 0.0, largest
    if falling(low) <= 0:
        return low
    if falling(high) >= 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


def _check_settings(settings: CanarySettings, delta: float) -> None:
    if settings.num_canaries < 20 or settings.num_canaries >= settings.dimension:
        raise ValueError(
            f"num_canaries={settings.num_canaries} for updates of {settings.dimension} values; expected at least 20, for a bound "
            "that says anything, and fewer than values."
        )
    if not 0 < settings.sampling_rate <= 1 or settings.num_rounds < 1:
        raise ValueError(
            f"sampling_rate={settings.sampling_rate}, num_rounds={settings.num_rounds}; expected a share in (0, 1], and a round."
        )
    if not (settings.clip > 0 and settings.length > 0 and 0 < delta < 1):
        raise ValueError(
            f"clip={settings.clip}, length={settings.length}, delta={delta}; expected positive numbers, δ below 1."
        )
