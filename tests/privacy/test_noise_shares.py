# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Noise in shares: its ε against exact divergences, what one client can move, and what any number of clients leaves."""

import math
import random

import numpy as np
import pytest
from scipy.special import ive

from fedlpp_hf.privacy.accounting import ClientSampling, compute_epsilon, solve_multiplier
from fedlpp_hf.privacy.noise_shares import NoiseShares, bound_divergence, compute_share_epsilon, round_within
from fedlpp_hf.privacy.secure_sums.terms import MOST_MEMBERS, compute_threshold


pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")


def measure_divergence(order, variance, shift):
    """Rényi divergence of Sk(μ) + shift from Sk(μ), summed up: P(k) = e^(−μ)·I_|k|(μ)."""
    width = int(60 + 20 * math.sqrt(variance) + 3 * order * shift)
    places = np.arange(-width, width + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = order * np.log(ive(np.abs(places - shift), variance)) + (1 - order) * np.log(
            ive(np.abs(places), variance)
        )
    logs = logs[np.isfinite(logs)]
    largest = logs.max()
    assert max(logs[0], logs[-1]) < largest - 30  # nothing is cut off
    return (largest + math.log(np.exp(logs - largest).sum())) / (order - 1)


@pytest.mark.parametrize("variance", [1.0, 5.0, 40.0, 1e3, 1e4])
@pytest.mark.parametrize("shift", [1, 2, 7])
@pytest.mark.parametrize("order", [2, 3, 8, 30])
def test_divergence_is_bounded(variance, shift, order):
    exact = measure_divergence(order, variance, shift)
    bound = bound_divergence(order, variance, shift, shift)
    assert exact <= bound * (1 + 1e-9)
    if (
        variance >= 1e4
    ):  # where the noise is wide, the bound is tight: twice the variance would be less than what is lost
        assert bound < 1.01 * exact
        assert bound_divergence(order, 2 * variance, shift, shift) < exact


@pytest.mark.parametrize("order", [2, 10, 40])
def test_divergence_of_two_values_is_bounded(order):
    """Of independent values divergences add up."""
    for shifts in ((1, 1), (3, 4), (0, 5)):
        for variance in (10.0, 400.0):
            exact = sum(measure_divergence(order, variance, shift) for shift in shifts if shift)
            assert exact <= bound_divergence(order, variance, math.hypot(*shifts), sum(shifts)) * (1 + 1e-9)


@pytest.mark.parametrize(("multiplier", "delta"), [(2.0, 1e-3), (8.0, 1e-5)])
def test_epsilon_is_above_the_exact_one_of_a_single_value(multiplier, delta):
    """δ(ε) = Σ max(0, P − e^ε·Q) of Skellam noise moved by two clips, in both ways the same."""
    noise = NoiseShares(multiplier, 0, 1)
    epsilon = compute_share_epsilon({noise: 1}, delta)
    width = int(14 * math.sqrt(noise.variance))
    places = np.arange(-width, width + 1)
    one, other = (ive(np.abs(places - moved), noise.variance) for moved in (2 * noise.levels, 0))

    def exact(spent):
        return float(np.maximum(0, one - math.exp(spent) * other).sum())

    assert exact(epsilon) <= delta
    assert exact(epsilon / 1.35) > delta  # no more than a third is given away
    assert exact(compute_share_epsilon({NoiseShares(2 * multiplier, 0, 1): 1}, delta)) > delta  # of one clip


@pytest.mark.parametrize("values", [1, 50_000, 5_000_000])
def test_epsilon_is_that_of_gaussian_noise_to_a_thousandth(values):
    for multiplier, rounds in ((1.5, 4), (10.0, 30)):
        gaussian = compute_epsilon(multiplier, ClientSampling("fixed", 9, 9), rounds, 1e-5)
        found = compute_share_epsilon({NoiseShares(multiplier, 1, values): rounds}, 1e-5)
        assert gaussian * (1 - 1e-4) <= found <= gaussian * 1.01  # Rényi's orders are integers here


def test_epsilon_adds_up_over_sums_of_several_kinds():
    one, other = NoiseShares(4.0, 0, 10), NoiseShares(6.0, 1, 10)
    both = compute_share_epsilon({one: 2, other: 3}, 1e-3)
    assert max(compute_share_epsilon({one: 2}, 1e-3), compute_share_epsilon({other: 3}, 1e-3)) < both
    assert both < compute_share_epsilon({one: 5}, 1e-3)
    assert compute_share_epsilon({one: 0}, 1e-3) == compute_share_epsilon({}, 1e-3) == 0.0
    with pytest.raises(ValueError, match="delta=1.0; expected a number between 0 and 1"):
        compute_share_epsilon({one: 1}, 1.0)


def test_what_the_tables_round_off_is_paid_for():
    """Where e^ε times it comes near δ, there is no bound: a claim of less would be wrong."""
    assert compute_share_epsilon({NoiseShares(0.25, 0, 10**7): 10}, 1e-5) == math.inf
    assert 10 < compute_share_epsilon({NoiseShares(2.0, 0, 10**7): 10}, 1e-5) < 40


def test_noise_is_solved_for_down_to_what_can_be_added():
    def spend(multiplier):
        return compute_share_epsilon({NoiseShares(multiplier, 1, 100): 5}, 1e-3)

    found = solve_multiplier(3.0, spend, "5 rounds", 1e-3)
    assert spend(found) <= 3.0 < spend(0.998 * found)


# --- What one client can move.
def make_worst(count, levels, clip):
    """Values half a step, and a little, above whole ones, at the clip: the nearest integers are all longer."""
    whole = max(1, int(levels / math.sqrt(count)))
    return np.full(count, (whole - 0.49) * clip / levels, np.float32)


@pytest.mark.parametrize("count", [1, 8, 1000, 50_000])
@pytest.mark.parametrize("clip", [1e-3, 0.3, 7.0])
def test_integers_are_never_longer_than_the_clip(count, clip):
    levels = NoiseShares(1.0, 0, count).levels
    draws = np.random.default_rng(count)
    for values in (
        draws.standard_normal(count).astype(np.float32),
        draws.standard_normal(count).astype(np.float32) * 1e30,
        make_worst(count, levels, clip),
        np.eye(1, count, dtype=np.float32)[0] * clip,
    ):
        found = round_within(values, clip, levels)
        assert found.dtype == np.int64 and int(found @ found) <= levels**2
        length = float(np.linalg.norm(values.astype(np.float64)))
        assert (
            np.linalg.norm(found) >= min(levels, length / clip * levels) * 0.995
        )  # and hardly shorter than they may be
    other = round_within(-values, clip, levels)
    moved = found - other
    assert np.linalg.norm(moved) <= 2 * levels
    assert np.abs(moved).sum() <= min(math.sqrt(count) * 2 * levels, 4 * levels**2)


def test_short_updates_are_rounded_to_the_nearest_step():
    values = np.random.default_rng(0).uniform(-0.01, 0.01, 400).astype(np.float32)
    levels = 5000
    error = round_within(values, 1.0, levels) / levels - values
    assert np.abs(error).max() <= 0.5 / levels + 1e-9
    assert (round_within(np.zeros(5, np.float32), 1.0, levels) == 0).all()


def test_what_is_accounted_is_what_a_client_can_move(monkeypatch):
    """The whole way from updates to the sum, with no noise: two neighbours differ by the accounted Δ₂ at most, and can."""
    monkeypatch.setattr(
        "fedlpp_hf.privacy.noise_shares.draw_skellam", lambda variance, count, read: np.zeros(count, int)
    )
    noise, clip = NoiseShares(1.0, 0, 200), 0.3
    far = np.random.default_rng(1).standard_normal(200).astype(np.float32) * 50
    moved = noise.encode(far, clip, 3) - noise.encode(-far, clip, 3)
    assert 0.995 * 2 * noise.levels <= np.linalg.norm(moved) <= 2 * noise.levels
    # In the units of the mean: two clips, divided by the sum's number of clients.
    assert np.linalg.norm(moved) * clip / noise.levels == pytest.approx(2 * clip, rel=5e-3)


# --- What the shares add up to.
@pytest.mark.parametrize("colluders", [0, 1, 2])
@pytest.mark.parametrize("members", [5, 9, 100])
def test_the_least_sum_without_colluders_has_the_accounted_variance(members, colluders):
    noise, threshold = NoiseShares(1.7, colluders, 1000), compute_threshold(0.6, members)
    share = noise.share_variance(threshold)
    assert (threshold - colluders) * share == pytest.approx(noise.variance)
    assert noise.variance == pytest.approx((1.7 * noise.levels) ** 2)
    assert all((left - colluders) * share >= noise.variance * (1 - 1e-12) for left in range(threshold, members + 1))


def test_share_that_is_drawn_has_that_variance():
    noise = NoiseShares(1.7, 1, 100_000)
    drawn = noise.encode(np.zeros(100_000, np.float32), 0.3, 4, random.Random(0).randbytes)
    assert float((drawn.astype(float) ** 2).mean()) * 3 / noise.variance == pytest.approx(
        1, abs=5 * math.sqrt(2 / 1e5)
    )


def test_nobody_is_left_where_all_may_collude():
    with pytest.raises(ValueError, match="opened with 2 clients, and 2 may collude: nobody's noise would count"):
        NoiseShares(1.0, 2, 10).share_variance(2)


@pytest.mark.parametrize("multiplier", [0.05, 0.1, 1.0, 30.0, 1024.0])
@pytest.mark.parametrize("values", [1, 50_000, 10**9])
def test_nothing_overflows(multiplier, values):
    """A sum beyond ±2³⁰ would come back with another sign, and nobody would see it."""
    noise = NoiseShares(multiplier, 0, values)
    assert noise.levels >= 16
    for threshold in (1, 2, MOST_MEMBERS):
        assert MOST_MEMBERS * noise.largest_summand(threshold) < 1 << 30


@pytest.mark.parametrize(
    "numbers", [(0.01, 0, 1), (2000.0, 0, 1), (math.nan, 0, 1), (math.inf, 0, 1), (1.0, -1, 1), (1.0, 0, 0)], ids=str
)
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match="Noise in shares with the multiplier"):
        NoiseShares(*numbers)


def test_reports_say_which_analysis_it_is():
    assert "those of 2 do not count; Skellam RDP accountant, no gain by sampling" in NoiseShares(1.0, 2, 3).describe()
