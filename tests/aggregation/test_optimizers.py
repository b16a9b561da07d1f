# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Yogi against a transcription of FedOpt's Algorithm 2, and the identities of the plain rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_hf.aggregation.optimizers import ServerOptimizer
from fedlpp_hf.config.rules import SERVER_OPTIMIZERS


def random_tensors(seed: int, rounds: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(2, 3, generator=generator), "b": torch.randn(4, generator=generator)} for _ in range(rounds)
    ]


def yogi(x: float, deltas: list[float], lr: float, beta1: float, beta2: float, tau: float) -> float:
    """Algorithm 2 of arXiv 2003.00295 for one coordinate, line by line."""
    m, v = 0.0, tau**2
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        v = v - (1 - beta2) * delta**2 * math.copysign(1, v - delta**2)
        x = x + lr * m / (math.sqrt(v) + tau)
    return x


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-4, 1e-1))
def test_yogi_is_the_papers(seed, lr, beta1, beta2, tau):
    optimizer = ServerOptimizer("yogi", lr)
    start, *deltas = random_tensors(seed, 5)
    adapter, state = start, {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BETA1", beta1), ("BETA2", beta2), ("TAU", tau)):
            patch.setattr(f"fedlpp_hf.aggregation.optimizers.{name}", value)
        for delta in deltas:
            adapter, state = optimizer.step(adapter, delta, state)
    for key, tensor in start.items():
        for place, x in enumerate(tensor.flatten().tolist()):
            changes = [delta[key].flatten()[place].item() for delta in deltas]
            expected = yogi(x, changes, lr, beta1, beta2, tau)
            assert adapter[key].flatten()[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_sgd_with_defaults_adds_the_mean_update_and_keeps_no_state():
    adapter, delta = random_tensors(0, 2)
    after, state = ServerOptimizer().step(adapter, delta, {})
    assert state == {}
    assert all(torch.equal(after[key], adapter[key] + delta[key]) for key in adapter)


def test_momentum_is_fedavgm():
    start, *deltas = random_tensors(1, 4)
    optimizer, adapter, state = ServerOptimizer(learning_rate=0.5, momentum=0.9), start, {}
    for delta in deltas:
        adapter, state = optimizer.step(adapter, delta, state)
    for key in start:
        velocity, expected = torch.zeros_like(start[key]), start[key]
        for delta in deltas:
            velocity = 0.9 * velocity + delta[key]
            expected = expected + 0.5 * velocity
        torch.testing.assert_close(adapter[key], expected)


@pytest.mark.parametrize("optimizer", [ServerOptimizer(momentum=0.9), ServerOptimizer("yogi")])
def test_step_writes_to_nothing_and_leaves_untrained_tensors_alone(optimizer):
    adapter, first, second = random_tensors(2, 3)
    before = {key: tensor.clone() for key, tensor in adapter.items()}
    middle, state = optimizer.step(adapter, first, {})
    kept = {key: tensor.clone() for key, tensor in state.items()}
    after, new_state = optimizer.step(middle, {"a": second["a"]}, state)
    assert all(torch.equal(adapter[key], before[key]) for key in adapter)
    assert all(torch.equal(state[key], kept[key]) for key in state)
    assert torch.equal(after["b"], middle["b"]) and not torch.equal(after["a"], middle["a"])
    assert all(torch.equal(new_state[key], state[key]) for key in state if key.endswith(".b"))


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_no_update_is_no_step_at_the_start(name):
    adapter = random_tensors(3)[0]
    after, _ = ServerOptimizer(name).step(adapter, {key: torch.zeros_like(t) for key, t in adapter.items()}, {})
    assert all(torch.equal(after[key], adapter[key]) for key in adapter)


def test_an_update_that_does_not_fit_is_refused():
    adapter = random_tensors(4)[0]
    for delta in ({"c": torch.zeros(2)}, {"b": torch.zeros(5)}):
        with pytest.raises(ValueError, match="the adapter has"):
            ServerOptimizer().step(adapter, delta, {})
