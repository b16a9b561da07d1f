# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Stolen value and its interval on cases with known answers."""

import numpy as np
import pytest

from fedlpp_hf.audit.stolen_value import estimate_interval, estimate_stolen_value
from fedlpp_hf.processes.measurement import RowMeasures


def measures(losses: np.ndarray) -> RowMeasures:
    return RowMeasures(losses, None, 10)


def rows(mean: float, count: int = 200, seed: int = 0, spread: float = 0.1) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal(count)


def test_is_the_share_of_the_gain():
    noise = rows(0.0)
    for measure, sign in (("loss", -1), ("accuracy", 1)):
        stolen = estimate_stolen_value(
            {"weak": noise + sign * 0.1, "strong": noise + sign * 0.75}, {"base": noise}, noise + sign, measure
        )
        assert stolen.best_attack == "strong" and stolen.best_local == "base"
        # What all models find hard alike cancels.
        assert (stolen.value, stolen.low, stolen.high) == pytest.approx((0.75, 0.75, 0.75))
        assert stolen.server - stolen.local_only == pytest.approx(sign)


@pytest.mark.parametrize("attacker, share", [(0.5, 1.5), (2.5, -0.5)])
def test_is_clipped_nowhere(attacker, share):
    noise = rows(0.0)
    stolen = estimate_stolen_value({"a": noise + attacker}, {"base": noise + 2}, noise + 1)
    assert stolen.value == pytest.approx(share)


def test_without_anything_sent_it_is_zero():
    stolen = estimate_stolen_value({}, {"base": rows(2.0), "trained": rows(1.5)}, rows(1.0, seed=1))
    assert (stolen.value, stolen.low, stolen.high, stolen.best_attack) == (0, 0, 0, "trained")


@pytest.mark.parametrize("server, words", [(3.0, "is worse than"), (2.0, "can't be told from")])
def test_without_a_gain_it_says_so_instead_of_a_number(server, words):
    stolen = estimate_stolen_value({"a": rows(1.0)}, {"base": rows(2.0, seed=1)}, rows(server, seed=2))
    assert stolen.value is stolen.low is stolen.high is None
    assert words in stolen.reason and "no value that could be stolen" in stolen.reason


def test_draws_without_a_gain_do_not_spoil_the_interval():
    """Of 40 answers the server has five more right: one draw in 200 has none of these, and its share would be 0/0."""
    local, server = np.zeros(40), np.arange(40) < 5
    stolen = estimate_stolen_value({"a": server}, {"base": local}, server, "accuracy", resamples=2000)
    assert (stolen.value, stolen.low, stolen.high) == (1, 1, 1)


def test_a_server_that_diverged_has_nothing_to_steal():
    server = rows(1.0)
    server[3] = np.nan
    stolen = estimate_stolen_value({"a": rows(1.5)}, {"base": rows(2.0)}, server)
    assert stolen.value is None and "NaN" in stolen.reason and np.isnan(stolen.server)


def test_interval_contains_the_truth():
    """95 % of intervals should; of 60, fewer than 50 would be a fault (p < 1e-4)."""
    found = 0
    for seed in range(60):
        noise = rows(0.0, seed=seed, spread=0.5)
        attacker, local, server = (noise + rows(m, seed=1000 * k + seed) for k, m in ((1, 1.4), (2, 2.0), (3, 1.0)))
        stolen = estimate_stolen_value({"a": attacker}, {"base": local}, server, seed=seed, resamples=300)
        found += stolen.low <= 0.6 <= stolen.high
        assert 0 < stolen.high - stolen.low < 0.2
    assert found >= 50


@pytest.mark.parametrize(
    "attack, local, words",
    [
        ({}, {}, "no local-only reference"),
        ({"a": rows(1.0, 3)}, {"base": rows(1.0)}, "one for each of 200 rows"),
        ({"a": rows(np.nan)}, {"base": rows(1.0)}, "`a` has a loss that is NaN"),
    ],
)
def test_bad_input_is_refused(attack, local, words):
    with pytest.raises(ValueError, match=words):
        estimate_stolen_value(attack, local, rows(1.0))


def test_interval_of_a_loss_is_that_of_its_difference_to_the_servers():
    noise, server = rows(0.0, spread=5.0), measures(rows(1.0, spread=5.0))
    # What all models find hard alike cancels: the rows differ by far more than the interval is wide.
    same = estimate_interval({"a": measures(server.loss + 0.25)}, server)
    assert same == pytest.approx([server.loss.mean() + 0.25] * 2)
    # The best is chosen anew in every draw, and can only be better than any of them.
    a, b = measures(server.loss + 0.1 * noise), measures(server.loss - 0.1 * noise)
    both, alone = estimate_interval({"a": a, "b": b}, server), estimate_interval({"a": a}, server)
    assert both[0] <= alone[0] < server.loss.mean() < alone[1] and both[1] < alone[1]
    assert estimate_interval({"a": a, "b": b}, server) == both


def test_interval_of_a_difference_contains_the_truth():
    found = []
    for seed in range(60):
        server, noise = rows(1.0, seed=seed), rows(0.3, seed=1000 + seed)
        low, high = estimate_interval({"a": measures(server + noise)}, measures(server), seed)
        found.append(low <= server.mean() + 0.3 <= high)
    assert sum(found) >= 50


def test_what_is_not_finite_has_no_interval():
    broken = rows(1.0)
    broken[3] = np.nan
    assert estimate_interval({"a": measures(rows(1.0))}, measures(broken)) is None
    assert estimate_interval({"a": measures(broken)}, measures(rows(1.0))) is None
