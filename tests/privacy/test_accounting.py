# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""ε against the accountant library's own values, closed forms, and the privacy loss of simulated outputs."""

import math

import numpy as np
import pytest

from fedlpp_hf.privacy.accounting import ClientSampling, compute_epsilon, solve_noise


dp = pytest.importorskip("dp_accounting", reason="needs the extra [privacy]")


def poisson(rate_percent: int) -> ClientSampling:
    return ClientSampling("poisson", 100, rate_percent)


@pytest.mark.parametrize(
    ("sampling", "noise", "releases", "delta"),
    [
        # dp_accounting/pld/pld_privacy_accountant_test.py: test_gaussian_basic, test_self_composed_subsampled_gaussian.
        (poisson(100), math.sqrt(3), 3, 0.126936),
        (poisson(20), 0.5, 3, 0.15594),
    ],
)
def test_poisson_has_the_values_of_the_librarys_own_tests(sampling, noise, releases, delta):
    assert compute_epsilon(noise, sampling, releases, delta) == pytest.approx(1.0, abs=2e-3)


def test_fixed_sampling_has_the_values_of_the_librarys_accountant_at_half_the_noise():
    """Its RDP accountant takes the noise in units of the sensitivity, which is two clips under replacing one."""
    sampling = ClientSampling("fixed", 1000, 10)
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp.SampledWithoutReplacementDpEvent(1000, 10, dp.GaussianDpEvent(1.0)), 50)
    assert compute_epsilon(2.0, sampling, 50, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize("releases", [1, 4])
def test_everyone_in_each_round_is_the_gaussian_mechanism(releases):
    """With the exact ε of Balle and Wang (arXiv 1805.06530) of one Gaussian of √k times the sensitivity."""
    exact = dp.get_epsilon_gaussian(2.0 / math.sqrt(releases), 1e-4)
    assert compute_epsilon(2.0, poisson(100), releases, 1e-4) == pytest.approx(exact, rel=1e-3)
    # Replacing one moves the sum twice as far. Rényi's ε is an upper bound, a tenth above it.
    bound = compute_epsilon(4.0, ClientSampling("fixed", 9, 9), releases, 1e-4)
    assert exact <= bound <= 1.25 * exact


def simulate_deltas(epsilon: float, noise: float, places: tuple, chances: tuple, releases: int) -> list[float]:
    """δ(ε) = E_P[(1 − e^(ε − L))⁺] both ways, by simulated outputs: the sum is at `places[0]` or at one of the others, with the
    chances of both neighbours."""
    generator = np.random.default_rng(0)
    centres = np.array(places)

    def log_density(outputs, weights):
        squares = -((outputs[..., None] - centres) ** 2) / (2 * noise**2)
        return np.log((np.exp(squares) * weights).sum(-1))

    deltas = []
    for one, other in (chances, chances[::-1]):
        drawn = generator.choice(len(centres), size=(400_000, releases), p=one)
        outputs = centres[drawn] + noise * generator.standard_normal(drawn.shape)
        loss = (log_density(outputs, np.array(one)) - log_density(outputs, np.array(other))).sum(1)
        deltas.append(float(np.maximum(0, 1 - np.exp(epsilon - loss)).mean()))
    return deltas


def test_privacy_loss_of_simulated_poisson_rounds_is_what_is_accounted():
    epsilon = compute_epsilon(1.0, poisson(30), 3, 0.02)
    deltas = simulate_deltas(epsilon, 1.0, (0.0, 1.0), ((0.7, 0.3), (1.0, 0.0)), 3)
    assert max(deltas) == pytest.approx(0.02, rel=0.05)  # the worse of both ways is the ε, and no more


@pytest.mark.parametrize("clients", [2, 4])
def test_privacy_loss_of_simulated_fixed_rounds_is_bounded(clients):
    """The client that is replaced had the clip in one direction, and then has it in the other."""
    inside = 2 / clients
    sampling, chances = ClientSampling("fixed", clients, 2), ((1 - inside, inside, 0.0), (1 - inside, 0.0, inside))
    epsilon = compute_epsilon(2.0, sampling, 3, 0.05)
    assert max(simulate_deltas(epsilon, 2.0, (0.0, 1.0, -1.0), chances, 3)) <= 0.05
    if inside == 1:  # with the sensitivity of adding or removing one, less would be accounted than is lost
        wrong = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        wrong.compose(dp.GaussianDpEvent(2.0), 3)
        assert max(simulate_deltas(wrong.get_epsilon(0.05), 2.0, (0.0, 1.0, -1.0), chances, 3)) > 0.1


@pytest.mark.parametrize(
    ("sampling", "target", "delta", "releases"),
    [
        (poisson(10), 3.0, 1e-3, 2),
        (ClientSampling("fixed", 40, 40), 3.0, 1e-3, 10),
        (ClientSampling("fixed", 9, 9), 60.0, 1e-3, 1),
    ],
    ids=str,
)
def test_solved_noise_spends_the_target_and_no_more(sampling, target, delta, releases):
    noise = solve_noise(target, delta, sampling, releases)
    assert compute_epsilon(noise, sampling, releases, delta) <= target
    assert compute_epsilon(0.998 * noise, sampling, releases, delta) > target


def test_nothing_is_spent_before_the_first_round_and_more_with_each():
    spent = [compute_epsilon(1.0, poisson(10), releases, 1e-3) for releases in range(4)]
    assert spent[0] == 0 and spent == sorted(spent) and len(set(spent)) == 4
    # However little noise: an upper bound that fits in memory.
    assert 1e3 < compute_epsilon(0.1, poisson(100), 100, 1e-3) < 1e5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, poisson(10), 1, 0.1), "noise_multiplier=0.0"),
        ((1.0, poisson(10), -1, 0.1), "releases=-1"),
        ((1.0, poisson(10), 1, 1.0), "delta=1.0"),
        ((1.0, ClientSampling("fixed", 3, 4), 1, 0.1), "4 of 3 clients in a round; expected 1 to all"),
    ],
)
def test_arguments_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        compute_epsilon(*values)


def test_reports_say_which_analysis_it_is():
    assert "Poisson sampling at rate 0.1; PLD accountant; against adding or removing" in poisson(10).describe()
    assert "10 of 40 clients in each round; RDP accountant, twice the" in ClientSampling("fixed", 40, 10).describe()
