# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Noise and draws: their distribution, and where their randomness comes from."""

import ast
import hashlib
import random
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import fedlpp_hf.privacy
from fedlpp_hf.privacy.accounting import ClientSampling
from fedlpp_hf.privacy.draws import draw_clients
from fedlpp_hf.privacy.noise import draw_gaussian, draw_uniform


def read_seeded(seed: bytes):
    """Random bytes that are the same each time."""
    calls = []

    def read(count: int) -> bytes:
        calls.append(count)
        return hashlib.shake_256(seed + len(calls).to_bytes(4)).digest(count)

    return read


def test_noise_is_gaussian():
    values = draw_gaussian(200_000, read_seeded(b"a"))
    assert values.dtype == np.float64
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 5 / np.sqrt(2e5) and abs(values.var() - 1) < 5 * np.sqrt(2 / 2e5)
    assert 4.0 < np.abs(values).max() < 6.5  # tails, too
    lagged = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(lagged) < 5 / np.sqrt(2e5)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 2**16, 2**16 + 1])
def test_so_many_values_as_were_asked_for(count):
    values = draw_gaussian(count, read_seeded(b"b"))
    assert values.shape == (count,) and len(np.unique(values)) == count


def test_uniform_numbers_stay_within_their_ends():
    assert draw_uniform(1, lambda count: bytes(count)) > 0
    assert draw_uniform(1, lambda count: b"\xff" * count) < 1


def test_noise_is_the_operating_systems_and_knows_no_seed(monkeypatch):
    """The Mersenne Twister of NumPy or Python, or a generator of torch, would repeat itself."""
    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append(draw_gaussian(100))
    assert not np.array_equal(*drawn)
    assert draw_gaussian.__defaults__ == (secrets.token_bytes,)
    for path in Path(fedlpp_hf.privacy.__path__[0]).glob("*.py"):
        names = {
            ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        used = {name for name in names if name.startswith(("np.random", "random.", "torch.rand", "torch.normal"))}
        assert not used, path.name


def test_each_value_takes_bits_of_its_own():
    read = []

    def count_bytes(count):
        read.append(count)
        return secrets.token_bytes(count)

    draw_gaussian(1000, count_bytes)
    assert sum(read) >= 1000 * 4 * 8  # four terms of one uniform number each, on average


CLIENTS = [f"c{number}" for number in range(50)]


def test_poisson_draws_each_client_by_itself():
    sampling = ClientSampling("poisson", 50, 2)
    draws = [draw_clients(b"s" * 32, number, CLIENTS, sampling) for number in range(4000)]
    sizes = np.array([len(draw) for draw in draws])
    # Binomial(50, 0.04): a fixed size would have no variance.
    assert sizes.mean() == pytest.approx(2, abs=0.12) and sizes.var() == pytest.approx(1.92, abs=0.25)
    assert (sizes == 0).mean() == pytest.approx(0.96**50, abs=0.03)  # rounds with nobody
    times = np.array([sum(client in draw for draw in draws) for client in CLIENTS])
    assert stats.chisquare(times).pvalue > 1e-3
    together = sum("c0" in draw and "c1" in draw for draw in draws)
    assert together < 25  # 6.4 expected


def test_fixed_draws_so_many_uniformly():
    sampling = ClientSampling("fixed", 50, 5)
    draws = [draw_clients(b"s" * 32, number, CLIENTS, sampling) for number in range(2000)]
    assert {len(set(draw)) for draw in draws} == {5}
    assert all(draw == sorted(draw, key=CLIENTS.index) for draw in draws)
    assert stats.chisquare([sum(client in draw for draw in draws) for client in CLIENTS]).pvalue > 1e-3
    everyone = ClientSampling("fixed", 50, 50)
    assert draw_clients(b"s" * 32, 0, CLIENTS, everyone) == CLIENTS


@pytest.mark.parametrize("kind", ["poisson", "fixed"])
def test_draws_are_a_function_of_the_secret(kind):
    sampling = ClientSampling(kind, 50, 10)
    first = draw_clients(b"s" * 32, 1, CLIENTS, sampling)
    assert draw_clients(b"s" * 32, 1, CLIENTS, sampling) == first  # a resumed server draws the same
    assert draw_clients(b"t" * 32, 1, CLIENTS, sampling) != first
    assert draw_clients(b"s" * 32, 2, CLIENTS, sampling) != first
