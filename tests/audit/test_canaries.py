# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""ε from canary clients: it brackets a known mechanism's, and refutes each planted mistake that it can see."""

import math
import random
from statistics import NormalDist

import numpy as np
import pytest

from benchmarks.canary_epsilon import MISTAKES, SOUND, account, run_case
from fedlpp_hf.audit.canaries import (
    CanarySettings,
    audit_canaries,
    bound_epsilon,
    bound_share,
    gaussian_epsilon,
    judge_canaries,
)
from fedlpp_hf.privacy.noise_shares import NoiseShares, round_within


pytest.importorskip("dp_accounting")


def make_release(noise: float, dimension: int, seed: int):
    generator = np.random.default_rng(seed)
    return lambda number, sent: (
        sum((c.update for c in sent), np.zeros(dimension)) + noise * generator.normal(size=dimension)
    )


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 4.0])
def test_epsilon_of_the_gaussian_mechanism_is_the_accountant_s(noise_multiplier):
    assert gaussian_epsilon(1 / noise_multiplier, 1e-5) == pytest.approx(account(noise_multiplier, 1, 1.0), abs=2e-3)
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(-1.0, 1e-5) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise_multiplier", [0.7, 1.5])
def test_canaries_bracket_the_truth(noise_multiplier, seed):
    settings = CanarySettings(4000, clip=2.0, num_canaries=200, seed=seed)
    found = audit_canaries(make_release(2 * noise_multiplier, 4000, 10 + seed), settings, 1e-5)
    truth = account(noise_multiplier, 1, 1.0)
    assert found.epsilon_low < truth < found.epsilon_high and found.epsilon_high - found.epsilon_low < truth
    assert 0 < found.bound < truth and not found.refuted


@pytest.mark.parametrize(("shares", "refuted"), [(4, False), (1, True)])
def test_noise_in_shares_of_the_least_sum_without_colluders(shares, refuted):
    """Six clients open a sum, and two of them collude: the shares of four are the noise, and that of one is not enough."""
    noise, bits = NoiseShares(0.7, 2, 4000), random.Random(0).randbytes

    def release(number, sent):
        integers = sum((round_within(c.update, 2.0, noise.levels) for c in sent), np.zeros(4000, np.int64))
        for _ in range(shares):
            integers = integers + noise.encode(np.zeros(4000, np.float32), 2.0, 6, bits)
        return integers * 2.0 / noise.levels

    found = audit_canaries(release, CanarySettings(4000, clip=2.0, num_canaries=200), 1e-5, account(0.7, 1, 1.0))
    assert found.refuted is refuted
    if not refuted:
        assert found.epsilon_low < account(0.7, 1, 1.0) < found.epsilon_high


@pytest.mark.parametrize("sampling_rate", [1.0, 0.25])
@pytest.mark.parametrize("seed", range(3))
def test_a_sound_mechanism_is_not_refuted(sampling_rate, seed):
    found = run_case(SOUND, sampling_rate, seed)
    assert found.accounted and not found.refuted
    assert max(found.epsilon_low, found.bound) <= found.accounted


@pytest.mark.parametrize("sampling_rate", [1.0, 0.25])
@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name != SOUND])
def test_a_planted_mistake_is_refuted_where_it_can_be_seen(mistake, sampling_rate):
    """Noise of a seed of 32 bits has the right distribution: no test on releases sees it, only who reads the code."""
    for seed in range(3):
        assert run_case(mistake, sampling_rate, seed).refuted is MISTAKES[mistake], seed


def test_bound_of_a_share_is_clopper_and_pearson_s():
    # All of n: P(n of n) = p^n; none: nothing is known. 8 of 10 at 95 %: 0.4931, as in tables.
    assert bound_share(20, 20, 0.95) == pytest.approx(0.05 ** (1 / 20)) and bound_share(0, 20) == 0
    assert bound_share(8, 10, 0.95) == pytest.approx(0.4931, abs=1e-4)


def test_chance_shows_no_epsilon_and_certainty_a_large_one():
    generator = np.random.default_rng(0)
    chance = judge_canaries(generator.normal(size=400), 1e-5)
    assert chance.epsilon_low == 0 and chance.bound == 0
    assert bound_epsilon(generator.normal(8, 1, size=400), 1e-5) > 20
    # The bound holds for noise of any kind: half of the canaries at 3, half at 0.
    mixed = np.r_[generator.normal(3, 1, 200), generator.normal(0, 1, 200)]
    truth = math.log((0.5 + NormalDist().cdf(-3)) / 2 / NormalDist().cdf(-3))
    assert 0 < bound_epsilon(generator.permutation(mixed), 1e-5) < truth


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_canaries": 10}, "num_canaries=10"), ({"num_canaries": 50}, "fewer than values"), ({"sampling_rate": 0.0}, "sampling_rate=0.0"),
     ({"clip": 0.0}, "clip=0.0")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes, message):
    settings = CanarySettings(**{"dimension": 50, "clip": 1.0, "num_canaries": 20, **changes})
    with pytest.raises(ValueError, match=message):
        audit_canaries(make_release(1.0, 50, 0), settings, 1e-5)
    if not changes.keys() - {"clip"}:
        with pytest.raises(ValueError, match="The release has shape"):
            audit_canaries(lambda number, sent: np.zeros(49), CanarySettings(50, 1.0, 20), 1e-5)
