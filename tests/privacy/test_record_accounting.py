# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""ε of DP-SGD against closed forms, numerical integration, and another library's accountant."""

import math
import sys

import numpy as np
import pytest

from fedlpp_hf.privacy import record_accounting
from fedlpp_hf.privacy.record_accounting import RecordBudget, compute_record_epsilon, solve_record_noise


pytest.importorskip("dp_accounting", reason="needs the extra `privacy`")


def normal_cdf(value):
    return math.erfc(-value / math.sqrt(2)) / 2


def gaussian_delta(epsilon, noise):
    """δ of the Gaussian mechanism of sensitivity 1, in closed form (arXiv 1805.06530, Theorem 8)."""
    return normal_cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal_cdf(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 1), (5.0, 40)])
def test_without_sampling_it_is_the_closed_form(noise, steps):
    epsilon = compute_record_epsilon([(noise, 1.0, steps)], 1e-5)
    # `steps` Gaussian mechanisms are one with √steps times less noise.
    together = noise / math.sqrt(steps)
    assert gaussian_delta(epsilon, together) <= 1e-5 <= gaussian_delta(epsilon * 0.998, together)


@pytest.mark.parametrize(("noise", "rate"), [(0.8, 0.1), (1.5, 0.5)])
def test_one_sampled_step_is_the_integral(noise, rate):
    """δ(ε) = ∫ max(0, P − e^ε·Q) for the two outputs of a sampled step, with and without the row."""
    epsilon = compute_record_epsilon([(noise, rate, 1)], 1e-4)
    x = np.linspace(-40, 41, 2_000_001)
    without = np.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    with_row = (1 - rate) * without + rate * np.exp(-((x - 1) ** 2) / (2 * noise**2)) / (
        noise * math.sqrt(2 * math.pi)
    )

    def delta(epsilon):
        added = np.trapezoid(np.maximum(0, with_row - math.exp(epsilon) * without), x)
        removed = np.trapezoid(np.maximum(0, without - math.exp(epsilon) * with_row), x)
        return max(added, removed)

    assert delta(epsilon) <= 1e-4 * (1 + 1e-6) and delta(epsilon * 0.98) > 1e-4


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (2.0, 0.3, 40),
        pytest.param(1.0, 0.02, 400, marks=pytest.mark.slow),
        pytest.param(0.7, 0.1, 100, marks=pytest.mark.slow),
    ],
)
def test_another_librarys_accountant(noise, rate, steps):
    accountants = pytest.importorskip("opacus.accountants", reason="needs the extra `privacy`")
    other = accountants.PRVAccountant()
    other.history = [(noise, rate, steps)]
    assert compute_record_epsilon([(noise, rate, steps)], 1e-5) == pytest.approx(
        other.get_epsilon(delta=1e-5), rel=0.01
    )


def test_runs_add_up():
    runs = [(1.0, 0.02, 100), (1.1, 0.03, 50), (1.0, 0.02, 50)]
    spent = [compute_record_epsilon(runs[:count], 1e-5) for count in range(4)]
    assert spent[0] == 0.0 and spent == sorted(spent) and spent[3] > spent[2] > spent[1] > 0
    assert spent[3] == compute_record_epsilon([(1.1, 0.03, 50), (1.0, 0.02, 150)], 1e-5)
    assert spent[3] < compute_record_epsilon([(1.0, 0.03, 200)], 1e-5)
    assert compute_record_epsilon([(0.05, 1.0, 1000)], 1e-5) > 1000  # no error where nothing is protected


@pytest.mark.parametrize(
    "epsilon", [pytest.param(0.5, marks=pytest.mark.slow), 3.0, pytest.param(8.0, marks=pytest.mark.slow)]
)
def test_noise_is_the_least_that_keeps_the_budget(epsilon):
    budget = RecordBudget(epsilon, 1e-5, 1.0, rounds=4)
    noise = solve_record_noise(budget, 0.05, 25)
    runs = [(noise, 0.05, 25)] * 4
    assert compute_record_epsilon(runs, 1e-5) <= epsilon < compute_record_epsilon([*runs, runs[0]], 1e-5)
    assert compute_record_epsilon([(noise * 0.995, 0.05, 100)], 1e-5) > epsilon


@pytest.mark.parametrize("run", [(0.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1), (math.nan, 0.1, 1)])
def test_numbers_out_of_range(run):
    with pytest.raises(ValueError, match="expected a positive number, a share"):
        compute_record_epsilon([run], 1e-5)
    with pytest.raises(ValueError, match="expected a positive number, a share"):
        compute_record_epsilon([(1.0, 0.1, 1)], 1.0)


def test_budget_that_no_noise_keeps():
    with pytest.raises(ValueError, match="No noise makes 10 steps spend less"):
        solve_record_noise(RecordBudget(1e-9, 1e-12, 1.0, 1), 1.0, 10)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match=r"needs dp-accounting: pip install 'fedlpp_hf\[privacy\]"):
        record_accounting._compute_epsilon.__wrapped__(((1.0, 0.1, 1),), 1e-5)
