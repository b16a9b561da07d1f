# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Marks as a code: what is drawn, what a score means for the innocent, and what coalitions leave of it."""

import math

import numpy as np
import pytest

from fedlpp_hf.privacy.marks import Mark, Tracer, bound_false_alarm, draw_biases, draw_choices


SECRET = b"an owner's secret of 32 bytes..."
CLIENTS = [f"client-{number}" for number in range(12)]
COUNT = 20_000


def choices_of(client: str, secret: bytes = SECRET) -> np.ndarray:
    """1 where the client's copy is rounded up, −1 elsewhere."""
    return np.where(draw_choices(Mark(secret, client), "w", COUNT), 1.0, -1.0)


def trace(values: np.ndarray, secret: bytes = SECRET, clients=CLIENTS) -> list:
    tracer = Tracer(secret, clients)
    tracer.add("w", values)
    return list(tracer.results())


def test_choices_are_a_function_of_secret_client_and_tensor():
    first = draw_choices(Mark(SECRET, "a"), "w", 1000)
    assert np.array_equal(first, draw_choices(Mark(SECRET, "a"), "w", 1000))
    assert np.array_equal(first[:300], draw_choices(Mark(SECRET, "a"), "w", 300))
    for mark, name in ((Mark(SECRET, "b"), "w"), (Mark(SECRET, "a"), "v"), (Mark(b"x" * 32, "a"), "w")):
        assert not np.array_equal(first, draw_choices(mark, name, 1000))


def test_choices_follow_the_biases_and_biases_tardos_density():
    biases = draw_biases(SECRET, "w", COUNT)
    assert biases.min() > 0.0499 and biases.max() < 0.9501
    share = np.mean([draw_choices(Mark(SECRET, f"c{n}"), "w", COUNT) for n in range(200)], axis=0)
    standard_errors = (share - biases) / np.sqrt(biases * (1 - biases) / 200)
    assert abs(standard_errors.mean()) < 0.05 and standard_errors.std() == pytest.approx(1, abs=0.03)
    # Arcsine: half of the positions have a bias outside of [0.15, 0.85], a uniform one would have 0.33 there.
    assert np.mean((biases < 0.15) | (biases > 0.85)) == pytest.approx(0.35, abs=0.08)


def test_own_copy_agrees_wholly_and_others_not_at_all():
    first, *others = trace(choices_of("client-3"))
    assert first.client == "client-3" and first.correlation == pytest.approx(1.0)
    assert first.score > 100 and first.false_alarm < 1e-300
    assert all(abs(other.score) < 5 and other.false_alarm > 1e-3 for other in others)


def test_scores_of_the_innocent_are_standard_normal():
    """Of 2,000 clients, none of whom made the suspect, scores have mean 0 and deviation 1, and the bound holds."""
    found = trace(choices_of("somebody else"), clients=[f"innocent-{n}" for n in range(2000)])
    scores = np.array([one.score for one in found])
    assert abs(scores.mean()) < 4 / math.sqrt(2000) and scores.std() == pytest.approx(1, abs=0.07)
    total = math.sqrt(COUNT)  # one standard deviation
    for deviations in (1, 2, 3):
        assert np.mean(scores >= deviations) <= bound_false_alarm(deviations * total, COUNT)
    assert min(one.false_alarm for one in found) > 1e-3  # of all 2,000 together


@pytest.mark.parametrize("how", ["mean", "majority", "minority", "splice"])
@pytest.mark.parametrize("size", [2, 4])  # of twelve
def test_coalitions_are_found_and_nobody_else(how, size):
    group = CLIENTS[:size]
    stack = np.stack([choices_of(client) for client in group])
    total = stack.sum(0)
    if how == "mean":
        values = stack.mean(0)
    elif how == "splice":
        values = stack[np.random.default_rng(0).integers(size, size=COUNT), np.arange(COUNT)]
    else:
        majority = np.where(total >= 0, 1.0, -1.0)
        mixed = np.abs(total) < size
        values = np.where(mixed & (how == "minority"), -majority, majority)
    accused = [one.client for one in trace(values) if one.false_alarm < 1e-6]
    assert accused and set(accused) <= set(group)
    if how != "minority":
        assert set(accused) == set(group)


def test_nothing_to_compare_accuses_nobody():
    assert all(one.false_alarm == 1.0 and one.score == 0.0 for one in trace(np.zeros(0)))
    assert all(one.false_alarm == 1.0 for one in trace(np.zeros(COUNT)))
