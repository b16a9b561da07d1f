# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""ε from canary clients against the accounted ε: a sound mechanism, and the mistakes that others made.

    python -m benchmarks.canary_epsilon

Three seeds, with and without Poisson sampling, 10 rounds, noise multiplier 3, δ = 1e-5, updates of 2,000 values, 600 clients that
send zeros, and 200 canaries of ten times the clip that claim 100 times the examples. Needs the extra `privacy` for the accountant. A minute of one core.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from fedlpp_hf.audit.canaries import CanarySettings, Contribution, Release, audit_canaries
from fedlpp_hf.audit.data_report import CanaryAudit
from fedlpp_hf.report.tables import format_table


CLIP, DELTA, HONEST, CANARIES = 0.5, 1e-5, 600, 200
SOUND = "none"
GROWTH = 0.3  # of the logarithm of the clip in each round
# What is planted, and whether a test on cosines can see it.
MISTAKES = {
    SOUND: False,
    "no clip at the server": True,
    "clip grows, noise stays": True,
    "clip multiplies instead of dividing": True,
    "noise for equal weights, weights by examples": True,
    "noise divided by the clients twice": True,
    "noise of a seed of 32 bits": False,
    "noise of one seed for all rounds": True,
}


def account(noise_multiplier: float, num_rounds: int, sampling_rate: float, delta: float = DELTA) -> float:
    """ε of the composed, Poisson-sampled Gaussian mechanism, by the accountant of privacy loss distributions."""
    from dp_accounting import dp_event, pld

    event: dp_event.DpEvent = dp_event.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        event = dp_event.PoissonSampledDpEvent(sampling_rate, event)
    accountant = pld.PLDAccountant()
    accountant.compose(dp_event.SelfComposedDpEvent(event, num_rounds))
    return float(accountant.get_epsilon(delta))


def clip_vector(vector: np.ndarray, limit: float) -> np.ndarray:
    return vector * min(1.0, limit / max(float(np.linalg.norm(vector)), 1e-30))


def make_release(mistake: str, dimension: int, noise_multiplier: float, expected: float, seed: int) -> Release:
    """The noisy mean of clipped updates, (Σ clip(Δ_i) + N(0, (z·clip)²)) / expected, with one `mistake` planted."""
    own = np.random.default_rng([seed, 1])

    def clip(number: int, update: np.ndarray) -> np.ndarray:
        norm = max(float(np.linalg.norm(update)), 1e-30)
        if mistake == "no clip at the server":
            return update
        if mistake == "clip multiplies instead of dividing":
            return update * max(1.0, norm / CLIP)
        return clip_vector(
            update, CLIP * np.exp(GROWTH * (number - 1)) if mistake == "clip grows, noise stays" else CLIP
        )

    def draw(number: int) -> np.ndarray:
        if mistake == "noise of a seed of 32 bits":
            return np.random.RandomState(int(own.integers(2**32))).standard_normal(dimension)
        if mistake == "noise of one seed for all rounds":
            return np.random.RandomState(seed).standard_normal(dimension)
        return own.standard_normal(dimension)

    def release(number: int, contributions: Sequence[Contribution]) -> np.ndarray:
        total = np.zeros(dimension)
        examples = sum(entry.num_examples for entry in contributions)
        for entry in contributions:
            weight = 1.0
            if mistake == "noise for equal weights, weights by examples":
                weight = entry.num_examples * len(contributions) / examples
            total += weight * clip(number, entry.update)
        noise = noise_multiplier * CLIP * draw(number)
        return (total + noise / (expected if mistake == "noise divided by the clients twice" else 1.0)) / expected

    return release


def make_others(dimension: int, count: int) -> Callable[[int], list[Contribution]]:
    """Clients that send zeros: the attacker against whom ε holds knows all others, and can subtract them."""
    zero = Contribution(np.zeros(dimension))
    return lambda number: [zero] * count


def run_case(
    mistake: str, sampling_rate: float, seed: int, noise_multiplier: float = 3.0, rounds: int = 10, dimension: int = 2_000,
    num_canaries: int = CANARIES,
) -> CanaryAudit:  # fmt: skip
    """The audit of one mechanism."""
    honest = int(HONEST * sampling_rate)
    expected = sampling_rate * (HONEST + num_canaries)
    settings = CanarySettings(
        dimension, CLIP, num_canaries, rounds, sampling_rate, length=10.0, num_examples=100, seed=seed
    )
    release = make_release(mistake, dimension, noise_multiplier, expected, seed)
    accounted = account(noise_multiplier, rounds, sampling_rate)
    return audit_canaries(release, settings, DELTA, accounted, make_others(dimension, honest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    table = [
        [
            "planted mistake",
            "sampling",
            "accounted ε",
            "estimated ε",
            "its interval begins at",
            "lower bound",
            "refuted in",
        ]
    ]
    for rate in (1.0, 0.25):
        for mistake in MISTAKES:
            found = [run_case(mistake, rate, seed) for seed in arguments.seeds]
            ends = [
                sorted(values)
                for values in ([a.epsilon for a in found], [a.epsilon_low for a in found], [a.bound for a in found])
            ]
            table.append(
                [
                    mistake, f"{rate:g}", f"{found[0].accounted:.2f}", *(f"{low:.2f} to {high:.2f}" for low, *_, high in ends),
                    f"{sum(audit.refuted for audit in found)} of {len(found)}",
                ]
            )  # fmt: skip
            print(format_table([table[0], table[-1]])[-1], flush=True)
    print("\n".join(format_table(table)))


if __name__ == "__main__":
    main()
