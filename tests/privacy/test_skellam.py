# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Skellam numbers: the distribution of their table, its variance, its 128 bits, and where the bits come from."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chi2, skellam

from fedlpp_hf.privacy.skellam import LARGEST_STD, SAMPLING_DISTANCE, draw_skellam, find_reach, make_table


VARIANCES = [0.01, 1.0, 30.5, 215.0**2]


def read_chances(variance):
    """P(X = k) of a table as integers in units of 2⁻¹²⁸, from −reach to reach."""
    table = make_table(variance)
    below = [0, *((int(one) << 64) + int(two) for one, two in zip(table.upper, table.lower, strict=True)), 1 << 128]
    return table.reach, [end - start for start, end in pairwise(below)]


def seeded(seed):
    return random.Random(seed).randbytes


@pytest.mark.parametrize("variance", VARIANCES)
def test_table_has_scipys_probabilities_at_half_the_variance(variance):
    """SciPy's parameters are the means of the two Poisson numbers, and each has half of the variance."""
    reach, chances = read_chances(variance)
    expected = skellam.pmf(np.arange(-reach, reach + 1), variance / 2, variance / 2)
    found = np.array([chance / 2**128 for chance in chances])
    assert np.abs(found - expected).sum() < 1e-10
    places = np.arange(-reach, reach + 1.0)
    assert float(found @ places**2) == pytest.approx(variance, rel=1e-9)
    assert min(chances) >= 0 and sum(chances) == 1 << 128


def test_table_is_as_exact_as_it_says():
    """Against Bessel functions with 60 digits."""
    mp = pytest.importorskip("mpmath")
    with mp.workdps(60):
        for variance in (0.25, 9.0):
            reach, chances = read_chances(variance)
            distance = sum(
                abs(mp.mpf(chance) / 2**128 - mp.exp(-variance) * mp.besseli(abs(k), variance))
                for k, chance in zip(range(-reach, reach + 1), chances, strict=True)
            )
            assert distance / 2 < SAMPLING_DISTANCE / 2**10  # which is for the largest table


def test_numbers_of_shares_add_up_to_one_of_all():
    """Closed under addition: what the noise of a sum rests on."""
    reach, parts = read_chances(2.5)
    part = np.array([chance / 2**128 for chance in parts])
    all_three = np.convolve(np.convolve(part, part), part)
    wide, whole = read_chances(7.5)
    middle = 3 * reach
    expected = np.array([chance / 2**128 for chance in whole])
    assert np.abs(all_three[middle - wide : middle + wide + 1] - expected).max() < 1e-15


def test_drawn_numbers_have_the_distribution():
    values = draw_skellam(4.0, 200_000, seeded(0))
    assert values.dtype == np.int64
    assert float(values.var()) == pytest.approx(4.0, rel=5 * math.sqrt(2 / len(values)) + 0.002)
    assert abs(float(values.mean())) < 5 * 2 / math.sqrt(len(values))
    places = np.arange(-7, 8)
    expected = skellam.pmf(places, 2, 2) * len(values)
    found = np.array([(values == place).sum() for place in places])
    assert ((found - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, len(places) - 1)


@pytest.mark.parametrize("std", [0.3, 200.0, 3000.0])
def test_variance_is_what_was_asked_for(std):
    count = 300_000
    values = draw_skellam(std**2, count, seeded(1)).astype(np.float64)
    kurtosis = 3 + 1 / std**2
    assert float((values**2).mean()) / std**2 == pytest.approx(1, abs=5 * math.sqrt((kurtosis - 1) / count))


def test_same_bytes_give_the_same_numbers_and_others_others():
    one, other, third = (draw_skellam(50.0, 1000, seeded(seed)) for seed in (3, 3, 4))
    assert (one == other).all() and (one != third).mean() > 0.8
    assert (draw_skellam(50.0, 1000) != draw_skellam(50.0, 1000)).mean() > 0.8  # the system's own have no seed


def test_lower_bits_decide_where_the_upper_ones_are_those_of_an_entry():
    """It happens once in 2⁵⁰ numbers, and is what makes the tails right."""
    table = make_table(30.5)
    place = table.reach + 2
    upper, lower = int(table.upper[place]), int(table.lower[place])
    for low, expected in ((lower - 1, 2), (lower, 3), (lower + 1, 3)):
        stream = iter([upper.to_bytes(8, "little") * 2, *[low.to_bytes(8, "little")] * 2])
        assert (draw_skellam(30.5, 2, lambda count, stream=stream: next(stream)) == expected).all()
    ends = iter([bytes(8), bytes(8), b"\xff" * 8, b"\xff" * 8])
    lowest, highest = (draw_skellam(30.5, 1, lambda count: next(ends))[0] for _ in range(2))
    assert lowest <= -table.reach + 2 and highest >= table.reach - 2


def test_reach_is_beyond_all_but_a_vanishing_part():
    for variance in (1.0, 30.5, 1e4):
        reach = find_reach(variance)
        assert skellam.sf(reach // 2, variance / 2, variance / 2) < 2.0**-20
        assert reach < 40 + 14 * math.sqrt(variance)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 1.1 * LARGEST_STD**2])
def test_variance_out_of_range_is_refused(variance):
    with pytest.raises(ValueError, match="A Skellam variance of .* expected a number above 0, and up to 16384²"):
        draw_skellam(variance, 1)
